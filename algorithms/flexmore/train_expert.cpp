// How an expert is trained beside the public one.
#include <algorithm>
#include <cmath>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include "algorithms/flexmore/direct.h"
#include "algorithms/flexmore/experts.h"
#include "algorithms/flexmore/flexmore.h"
#include "algorithms/flexmore/router_rows.h"
#include "algorithms/language_model.h"
#include "core/error.h"
#include "core/hash.h"
#include "data/text_dataset.h"
#include "models/tensor_io.h"

namespace moraine::algorithms::flexmore {
namespace {

at::Tensor trainable(const at::Tensor& tensor) {
  return tensor.detach().to(at::kFloat, /*non_blocking=*/false, /*copy=*/true).contiguous().set_requires_grad(true);
}

// A fresh low-rank correction for direct training without an adapter: A uniform(+-1/sqrt(in)), B zero, as LoRA
// (inferred: the paper extracts only).
models::LowRank fresh_low_rank(int64_t in, int64_t out, int64_t rank, uint64_t seed, at::Device device) {
  if (rank > std::min(in, out))
    throw core::UserError(
        fmt::format("algorithms/flexmore: rank {} is above {}, the smallest side of a [{}, {}] matrix", rank,
                    std::min(in, out), out, in),
        "choose a smaller rank");
  auto generator = at::detail::createCPUGenerator(seed);
  const double bound = 1 / std::sqrt(static_cast<double>(in));
  return {trainable(at::empty({rank, in}, at::kFloat).uniform_(-bound, bound, generator).to(device)),
          trainable(at::zeros({out, rank}, at::TensorOptions().dtype(at::kFloat).device(device)))};
}

using Datasets = std::vector<std::shared_ptr<data::TextDataset>>;

// Loss on batches whose rows come from the data sets in turn.
std::function<TrainJob::MicroLoss(int64_t, int64_t, int64_t)> joint_loss(models::Decoder& model, Datasets datasets,
                                                                         uint64_t seed, int64_t batch_size,
                                                                         at::Device device) {
  return
      [&model, datasets = std::move(datasets), seed, batch_size, device](int64_t step, int64_t first, int64_t count) {
        const auto sets = static_cast<int64_t>(datasets.size());
        const int64_t share = (batch_size + sets - 1) / sets;
        std::vector<at::Tensor> rows;
        for (int64_t row = first; row < first + count; ++row)
          rows.push_back(
              training_rows(*datasets[static_cast<size_t>(row % sets)], seed, step * share + row / sets, 1, device));
        const auto loss = model.loss(at::cat(rows));
        return TrainJob::MicroLoss{loss.sum, loss.count};
      };
}

// Takes a tensor into what is trained.
at::Tensor own(models::NamedTensors& parameters, const std::string& name, at::Tensor tensor) {
  parameters.emplace_back(name, tensor);
  return tensor;
}

// The FFN of an expert without an adapter before training: full-size copies of the public matrices, or factors.
models::FfnExpert fresh_ffn(const TrainExpertSpec& spec, const models::SlotBase& base, const std::string& prefix,
                            models::NamedTensors& parameters, at::Device device) {
  models::FfnExpert ffn;
  if (spec.rank == 0) {
    ffn.gate = own(parameters, prefix + "gate", trainable(base.gate));
    ffn.up = own(parameters, prefix + "up", trainable(base.up));
    ffn.down = own(parameters, prefix + "down", trainable(base.down));
    return ffn;
  }
  const auto fresh = [&](const std::string& name, const at::Tensor& weight) {
    models::LowRank pair =
        fresh_low_rank(weight.size(1), weight.size(0), spec.rank, core::derive_seed(spec.seed, prefix + name), device);
    own(parameters, prefix + name + ".a", pair.a);
    own(parameters, prefix + name + ".b", pair.b);
    return pair;
  };
  ffn.gate_delta = fresh("gate", base.gate);
  ffn.up_delta = fresh("up", base.up);
  ffn.down_delta = fresh("down", base.down);
  return ffn;
}

// An expert before training; everything of it that is trained goes into `parameters`.
Expert fresh_expert(const TrainExpertSpec& spec, const models::Decoder& model, const RowSources& sources,
                    const std::optional<adapters::Adapter>& adapter, models::NamedTensors& parameters,
                    at::Device device) {
  Expert expert{spec.name, {}, {}, {}};
  if (adapter) expert.layers = adapted_layers(*adapter, model), parameters = adapter->parameters();
  for (size_t l = 0; l < sources.own.mean.size(); ++l) {
    const std::string prefix = fmt::format("layers.{:03}.", l);
    if (!adapter) expert.layers.push_back(fresh_ffn(spec, model.base(ffn_slot(l)), prefix, parameters, device));
    const at::Tensor row = first_row(spec, sources, l).to(device);
    expert.router_rows.push_back(spec.rows.train ? own(parameters, prefix + "router", trainable(row)) : row);
    if (spec.rows.bias == "none") continue;
    const at::Tensor bias = at::full({1}, spec.rows.bias_value, at::TensorOptions().dtype(at::kFloat).device(device));
    const bool learned = spec.rows.bias == "learned";
    expert.biases.push_back(learned ? own(parameters, prefix + "router_bias", trainable(bias)) : bias);
  }
  std::sort(parameters.begin(), parameters.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  return expert;
}

}  // namespace

RowSources FlexMore::row_sources(const TrainExpertSpec& spec, const core::Artefact& public_embedding,
                                 models::Decoder& model, WorkerContext& context) const {
  const bool regression = spec.public_rows.init == "regression";
  RowSources sources;
  sources.public_mean = models::copy_of(*public_embedding.file().find("embedding"));
  if (regression) sources.public_moment = models::copy_of(*public_embedding.file().find("second_moment"));
  std::vector<Embedding> embeddings;
  for (const auto& data : spec.data)
    embeddings.push_back(
        domain_embedding(model, *load_text(data, context), spec.rows.embedding_sequences, regression, context));
  sources.own = mean_embedding(std::move(embeddings));
  std::vector<at::Tensor> encoded;
  for (const auto& encoder : spec.encoder)
    encoded.push_back(encoded_row(encoder, spec.rows.embedding_sequences, model.config().hidden_size, context));
  if (!encoded.empty()) sources.encoded = encoded.size() == 1 ? encoded.front() : at::stack(encoded).mean(0);
  return sources;
}

core::ArtefactPtr FlexMore::train_expert(const Unit& unit, WorkerContext& context) const {
  const auto spec = core::from_spec(TrainExpertSpec::schema(), unit.spec);
  auto model = load_base(spec, context)->share();
  const auto embedding = context.artefact(unit.inputs.at(0));
  const RowSources sources = row_sources(spec, *embedding, model, context);
  Datasets texts;
  for (const auto& data : spec.data) texts.push_back(load_text(data, context));

  Mixture mixture{public_rows(*embedding, spec.public_rows), {}};
  core::Json meta = {{"base", spec.base}, {"base_tensors", fingerprint_of_base(model.weights(), mixture.public_rows)}};
  const TrainConfig train = train_config(spec.train, config_.train);
  TrainJob job{train, {}, nullptr, texts.front()->seq_len()};
  job.loss = texts.size() == 1
                 ? language_model_loss(model, texts.front(), spec.seed, train.batch_size, context.device())
                 : joint_loss(model, texts, spec.seed, train.batch_size, context.device());
  std::optional<adapters::Adapter> adapter;
  if (spec.adapter) {
    // The gates of a fresh expert that is the public one sum to 1, so its gradients are the public model's but for the
    // tokens' gates (inferred): types that start from examples start from those.
    adapter = adapters::Adapter::create(*spec.adapter, model, spec.seed, context.device(),
                                        adapters::calibration_of(model, job.loss, train));
    job.groups = adapter->groups();
  }
  Expert expert = fresh_expert(spec, model, sources, adapter, job.parameters, context.device());
  mixture.experts = {expert};
  attach(model, mixture, {.top_k = 2, .norm_topk_prob = spec.norm_topk_prob, .kernels = mixture_kernels(spec.kernels)});
  const TrainOutcome outcome = context.train(std::move(job));
  if (adapter) {
    expert.layers = expert_layers(*adapter, model);
    expert.scales_by_rank = scales_by_rank(*spec.adapter);
    meta["adapter"] = adapters::adapter_schema().to_json(*spec.adapter);
  }
  const core::Json& data = unit.spec.at("data");
  meta["curve"] = curve_json(outcome);
  meta["data"] = data.size() == 1 ? data.front() : data;
  return write_expert(expert, std::move(meta));
}

}  // namespace moraine::algorithms::flexmore
