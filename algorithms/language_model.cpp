#include "algorithms/language_model.h"

#include <ATen/ops/from_blob.h>

#include "core/error.h"
#include "core/hash.h"
#include "models/checkpoint.h"

namespace moraine::algorithms {

std::string model_identity(const std::filesystem::path& directory, const core::Json& config) {
  const auto files = core::ShardedSafetensors::open(directory);
  std::string text = config.dump();
  for (const auto& tensor : files.tensors())
    text += fmt::format("\n{} {} {}", tensor.name, core::safetensors_name(tensor.dtype), core::sha256(tensor.data));
  return "dir:" + core::sha256(text);
}

std::shared_ptr<models::Decoder> cached_model(const std::filesystem::path& directory, const std::string& expected,
                                              const std::string& own, at::ScalarType dtype, WorkerContext& context) {
  const auto make = [&]() -> std::shared_ptr<void> {
    if (expected != own)
      throw core::UserError(
          fmt::format("algorithms: the public model in {} differs from the coordinator's", directory.string()),
          "every site must use a byte-identical public model");
    return std::make_shared<models::Decoder>(models::Decoder::from_directory(directory, dtype).on(context.device()));
  };
  const std::string key = fmt::format("base/{}/{}", c10::toString(dtype), expected);
  return std::static_pointer_cast<models::Decoder>(context.cached(key, make));
}

const core::Schema<TextSpec>& text_schema() {
  using C = TextSpec;
  static const auto schema = core::Schema<C>()
                                 .field("name", &C::name)
                                 .field("fingerprint", &C::fingerprint)
                                 .field("split", &C::split)
                                 .field("seq_len", &C::seq_len)
                                 .min(1)
                                 .field("tokenizer", &C::tokenizer);
  return schema;
}

std::shared_ptr<data::TextDataset> cached_dataset(const std::filesystem::path& path, const core::Json& spec,
                                                  WorkerContext& context) {
  const TextSpec text = core::from_spec(text_schema(), spec);
  const auto make = [&]() -> std::shared_ptr<void> {
    auto dataset =
        std::make_shared<data::TextDataset>(data::TextDataset::open(path, text.split, text.seq_len, text.tokenizer));
    if (dataset->info().fingerprint != text.fingerprint)
      throw core::UserError(fmt::format("algorithms: {} changed since the run was planned", path.string()),
                            "every worker must see the same prepared file; start again after copying it");
    return dataset;
  };
  return std::static_pointer_cast<data::TextDataset>(context.cached("data/" + spec.dump(), make));
}

at::Tensor training_rows(const data::TextDataset& dataset, uint64_t seed, int64_t first, int64_t count,
                         at::Device device) {
  std::vector<int64_t> rows = dataset.training_rows(seed, first, count);
  return at::from_blob(rows.data(), {count, dataset.seq_len() + 1}, at::kLong)
      .to(device, /*non_blocking=*/false, /*copy=*/true);
}

std::function<TrainJob::MicroLoss(int64_t step, int64_t first, int64_t count)> language_model_loss(
    models::Decoder& model, std::shared_ptr<data::TextDataset> dataset, uint64_t seed, int64_t batch_size,
    at::Device device) {
  return [&model, dataset = std::move(dataset), seed, batch_size, device](int64_t step, int64_t first, int64_t count) {
    const models::PassScope scope(model, {.training = true, .step = step, .first = first, .seed = seed});
    const auto loss = model.loss(training_rows(*dataset, seed, step * batch_size + first, count, device));
    return TrainJob::MicroLoss{loss.sum, loss.count};
  };
}

core::Json curve_json(const TrainOutcome& outcome) {
  core::Json curve = core::Json::array();
  for (const auto& [step, loss] : outcome.curve) curve.push_back({step, loss});
  return curve;
}

void write_model_directory(const std::filesystem::path& directory, const core::Json& config,
                           models::NamedTensors tensors) {
  std::vector<models::LazyTensor> stored;
  for (auto& [name, tensor] : tensors)
    stored.push_back({name, static_cast<int64_t>(tensor.nbytes()), [tensor = tensor] { return tensor; }});
  models::write_checkpoint(directory, config, std::move(stored));
}

}  // namespace moraine::algorithms
