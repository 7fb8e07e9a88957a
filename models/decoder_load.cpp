#include <algorithm>
#include <random>
#include <utility>

#include <ATen/ops/empty.h>

#include "core/error.h"
#include "core/json.h"
#include "models/decoder.h"
#include "models/tensor_io.h"

namespace moraine::models {
namespace {

constexpr size_t kMaxListed = 12;  // keys per kind in a message

bool computes_in(at::ScalarType dtype) { return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kDouble; }

/// Sorts a checkpoint's keys into right and wrong ones and reports the wrong ones together.
class KeyCheck {
 public:
  void missing(const std::string& name, const Shape& shape) {
    missing_.push_back(fmt::format("{} [{}]", name, fmt::join(shape, ", ")));
  }
  void left_over(const std::string& name) { left_over_.push_back(name); }
  void misfit(const std::string& name, const Shape& found, const Shape& expected) {
    misfits_.push_back(fmt::format("{} [{}], expected [{}]", name, fmt::join(found, ", "), fmt::join(expected, ", ")));
  }
  void throw_if_any(const std::string& origin) const {
    if (missing_.empty() && left_over_.empty() && misfits_.empty()) return;
    throw core::UserError(
        fmt::format("models: {}: the weights do not fit the config:{}{}{}", origin, list("missing", missing_),
                    list("left over", left_over_), list("wrong shape", misfits_)),
        "check that config.json belongs to these weights and that the download is complete");
  }

 private:
  static std::string list(const char* kind, const std::vector<std::string>& names) {
    if (names.empty()) return "";
    const std::vector<std::string> shown(names.begin(),
                                         names.begin() + static_cast<int64_t>(std::min(names.size(), kMaxListed)));
    const std::string more =
        names.size() > kMaxListed ? fmt::format("\n    and {} more", names.size() - kMaxListed) : "";
    return fmt::format("\n  {} ({}):\n    {}{}", kind, names.size(), fmt::join(shown, "\n    "), more);
  }
  std::vector<std::string> missing_, left_over_, misfits_;
};

std::vector<const core::TensorView*> matched(const DecoderConfig& config, const std::vector<core::TensorView>& tensors,
                                             const std::string& origin) {
  std::map<std::string_view, const core::TensorView*> found;
  for (const core::TensorView& view : tensors) found.emplace(view.name, &view);
  KeyCheck check;
  std::vector<const core::TensorView*> views;
  for (const auto& [name, shape] : expected_tensors(config)) {
    const auto at = found.find(name);
    if (at == found.end()) {
      check.missing(name, shape);
      continue;
    }
    if (at->second->shape != shape) check.misfit(name, at->second->shape, shape);
    views.push_back(at->second);
    found.erase(at);
  }
  for (const auto& [name, view] : found) check.left_over(view->name);
  check.throw_if_any(origin);
  return views;
}

at::ScalarType common_dtype(const std::vector<const core::TensorView*>& views, const std::string& origin) {
  const core::DType first = views.front()->dtype;
  for (const core::TensorView* view : views) {
    if (view->dtype == first && computes_in(scalar_type_of(first))) continue;
    throw core::UserError(fmt::format("models: {}: cannot compute in the stored types: '{}' is {}, '{}' is {}", origin,
                                      views.front()->name, core::safetensors_name(first), view->name,
                                      core::safetensors_name(view->dtype)),
                          "set the model's dtype to float32 or bfloat16 to convert on load");
  }
  return scalar_type_of(first);
}

at::Tensor random_normal(const std::string& name, const Shape& shape, uint64_t seed, double deviation) {
  std::vector<uint32_t> key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  key.insert(key.end(), name.begin(), name.end());
  std::seed_seq sequence(key.begin(), key.end());
  std::mt19937_64 generator(sequence);
  std::normal_distribution<double> normal(0.0, 1.0);
  at::Tensor tensor = at::empty(shape, at::kDouble);
  double* values = tensor.mutable_data_ptr<double>();
  std::generate(values, values + tensor.numel(), [&] { return deviation * normal(generator); });
  return tensor;
}

}  // namespace

Decoder Decoder::from_config(const DecoderConfig& config, uint64_t seed, at::ScalarType dtype) {
  if (const std::vector<std::string> wrong = config.problems(); !wrong.empty()) {
    throw core::UserError(fmt::format("models: cannot build a model of this config:\n  {}", fmt::join(wrong, "\n  ")));
  }
  std::map<std::string, at::Tensor> weights;
  for (const auto& [name, shape] : expected_tensors(config)) {
    at::Tensor tensor;
    if (name.ends_with("norm.weight")) {
      tensor = at::empty(shape, at::kDouble).fill_(1.0);
    } else if (name.ends_with(".bias")) {
      tensor = at::empty(shape, at::kDouble).fill_(0.0);
    } else {
      tensor = random_normal(name, shape, seed, config.initializer_range);
    }
    weights.emplace(name, tensor.to(dtype));
  }
  return Decoder(config, std::move(weights), dtype);
}

Decoder Decoder::from_directory(const std::filesystem::path& directory, std::optional<at::ScalarType> dtype) {
  const std::filesystem::path config_path = directory / "config.json";
  const DecoderConfig config = DecoderConfig::from_json(core::read_json(config_path), config_path.string());
  const auto files = std::make_shared<const core::ShardedSafetensors>(core::ShardedSafetensors::open(directory));
  return from_tensors(config, files->tensors(), directory.string(), dtype, files);
}

Decoder Decoder::from_tensors(const DecoderConfig& config, const std::vector<core::TensorView>& tensors,
                              const std::string& origin, std::optional<at::ScalarType> dtype,
                              const std::shared_ptr<const void>& owner) {
  const std::vector<const core::TensorView*> views = matched(config, tensors, origin);
  const at::ScalarType compute = dtype ? *dtype : common_dtype(views, origin);
  std::map<std::string, at::Tensor> weights;
  for (const core::TensorView* view : views) {
    const at::Tensor stored = borrow(*view, owner);
    if (!stored.is_floating_point()) {
      throw core::UserError(fmt::format("models: {}: '{}' holds {}, not floating-point weights", origin, view->name,
                                        core::safetensors_name(view->dtype)),
                            "quantised checkpoints are not supported: use the original weights");
    }
    const bool must_copy = owner == nullptr && stored.scalar_type() == compute;
    weights.emplace(view->name, must_copy ? stored.clone() : stored.to(compute));
  }
  return Decoder(config, std::move(weights), compute);
}

Decoder Decoder::on(at::Device device) const {
  std::map<std::string, at::Tensor> frozen;
  for (const auto& [name, tensor] : weights_) frozen.emplace(name, tensor.detach().to(device));
  return Decoder(config_, std::move(frozen), dtype_);
}

NamedTensors Decoder::make_trainable() {
  const at::ScalarType master = dtype_ == at::kBFloat16 ? at::kFloat : dtype_;
  NamedTensors leaves;
  for (auto& [name, tensor] : weights_) {
    tensor = tensor.detach().to(master, /*non_blocking=*/false, /*copy=*/true).set_requires_grad(true);
    leaves.emplace_back(name, tensor);
  }
  refer_to_weights();
  return leaves;
}

}  // namespace moraine::models
