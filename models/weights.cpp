#include "models/weights.h"

#include <algorithm>
#include <random>
#include <string_view>

#include <ATen/ops/empty.h>
#include <fmt/ranges.h>

#include "core/checked_product.h"
#include "core/error.h"
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

// "input_layernorm.weight", "norm.weight", "LayerNorm.weight", "layernorm_before.weight".
bool is_norm_weight(const std::string& name) {
  if (!name.ends_with(".weight")) return false;
  const std::string path = name.substr(0, name.size() - 7);
  const std::string module = path.substr(path.rfind('.') + 1);
  return module.find("norm") != std::string::npos || module.find("Norm") != std::string::npos;
}

}  // namespace

void require_plausible_layers(int64_t layers, int64_t experts, size_t tensors, const std::string& origin) {
  const int64_t needed[] = {layers, experts};
  const auto parts = core::checked_product(needed);
  if (parts && *parts <= static_cast<int64_t>(tensors)) return;
  const std::string with = experts > 1 ? fmt::format(" with {} experts each", experts) : "";
  throw core::UserError(fmt::format("models: {}: the config says {} layers{}, the weights hold {} tensors", origin,
                                    layers, with, tensors),
                        "check that config.json belongs to these weights and that the download is complete");
}

std::vector<const core::TensorView*> match_tensors(const NamedShapes& expected,
                                                   const std::vector<core::TensorView>& tensors,
                                                   const std::string& origin) {
  std::map<std::string_view, const core::TensorView*> found;
  for (const core::TensorView& view : tensors) found.emplace(view.name, &view);
  KeyCheck check;
  std::vector<const core::TensorView*> views;
  for (const auto& [name, shape] : expected) {
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

Weights match_weights(const NamedShapes& expected, const std::vector<core::TensorView>& tensors,
                      const std::string& origin, std::optional<at::ScalarType> dtype,
                      const std::shared_ptr<const void>& owner) {
  const std::vector<const core::TensorView*> views = match_tensors(expected, tensors, origin);
  Weights weights{{}, dtype ? *dtype : common_dtype(views, origin)};
  for (const core::TensorView* view : views) {
    const at::Tensor stored = borrow(*view, owner);
    if (!stored.is_floating_point()) {
      throw core::UserError(fmt::format("models: {}: '{}' holds {}, not floating-point weights", origin, view->name,
                                        core::safetensors_name(view->dtype)),
                            "quantised checkpoints are not supported: use the original weights");
    }
    const bool must_copy = owner == nullptr && stored.scalar_type() == weights.dtype;
    weights.tensors.emplace(view->name, must_copy ? stored.clone() : stored.to(weights.dtype));
  }
  return weights;
}

Weights random_weights(const NamedShapes& expected, uint64_t seed, double deviation, at::ScalarType dtype) {
  Weights weights{{}, dtype};
  for (const auto& [name, shape] : expected) {
    at::Tensor tensor;
    if (is_norm_weight(name)) {
      tensor = at::empty(shape, at::kDouble).fill_(1.0);
    } else if (name.ends_with(".bias")) {
      tensor = at::empty(shape, at::kDouble).fill_(0.0);
    } else {
      tensor = random_normal(name, shape, seed, deviation);
    }
    weights.tensors.emplace(name, tensor.to(dtype));
  }
  return weights;
}

}  // namespace moraine::models
