#include "models/backbone.h"

#include <algorithm>
#include <set>
#include <utility>

#include <ATen/TensorOperators.h>
#include <c10/core/ScalarType.h>

#include <fmt/ranges.h>

#include "core/error.h"
#include "core/registry.h"
#include "models/recompute.h"

namespace moraine::models {

Backbone::Backbone(Weights weights) : weights_(std::move(weights.tensors)), dtype_(weights.dtype) {
  MORAINE_CHECK(dtype_ == at::kFloat || dtype_ == at::kBFloat16 || dtype_ == at::kDouble,
                "models compute in float32, bfloat16 or float64");
}

at::Tensor Backbone::weight(const std::string& name) const {
  const auto at = weights_.find(name);
  return at == weights_.end() ? at::Tensor() : at->second;
}

void Backbone::add_slot(Slot slot) {
  index_.emplace(slot.path, slots_.size());
  slots_.push_back(std::move(slot));
  bases_.emplace_back();
  functions_.emplace_back();
}

size_t Backbone::slot_index(const std::string& path) const {
  if (const auto at = index_.find(path); at != index_.end()) return at->second;
  // Name the nearest paths: listing some hundred slots helps nobody.
  std::vector<std::string> paths;
  for (const Slot& slot : slots_) paths.push_back(slot.path);
  std::stable_sort(paths.begin(), paths.end(), [&](const std::string& a, const std::string& b) {
    return core::edit_distance(path, a) < core::edit_distance(path, b);
  });
  paths.resize(std::min<size_t>(paths.size(), 5));
  throw core::UserError(fmt::format("models: no such slot: '{}'", path),
                        fmt::format("nearest of {} slots: {}", slots_.size(), fmt::join(paths, ", ")));
}

void Backbone::attach(const std::string& path, std::shared_ptr<SlotFunction> function) {
  const size_t slot = slot_index(path);
  MORAINE_CHECK(function != nullptr, "attach '{}': no function given", path);
  MORAINE_CHECK(functions_[slot] == nullptr, "slot '{}' is taken: detach its function first", path);
  for (size_t other = 0; other < slots_.size(); ++other) {
    if (slots_[slot].kind == SlotKind::kBlock || slots_[other].kind == SlotKind::kBlock) continue;
    const std::string& rival = slots_[other].path;
    if (functions_[other] == nullptr || !(rival.starts_with(path + ".") || path.starts_with(rival + "."))) continue;
    throw core::UserError(
        fmt::format("models: cannot attach to '{}': '{}' is taken and one contains the other", path, rival),
        "target either the whole mlp or the matrices inside it, not both");
  }
  functions_[slot] = std::move(function);
}

void Backbone::detach(const std::string& path) { functions_[slot_index(path)] = nullptr; }

at::Tensor Backbone::apply(size_t slot, const at::Tensor& x) const {
  return functions_[slot] ? functions_[slot]->forward(x, bases_[slot], pass_) : bases_[slot].forward(x);
}

at::Tensor Backbone::through(const at::Tensor& x, const std::function<at::Tensor(const at::Tensor&)>& layer) {
  if (!pass_.recompute) return layer(x);
  std::vector<at::Tensor> leaves;
  std::set<const void*> known;  // several slots may share one
  const auto take = [&](const at::Tensor& tensor) {
    if (tensor.requires_grad() && known.insert(tensor.unsafeGetTensorImpl()).second) leaves.push_back(tensor);
  };
  for (const auto& function : functions_)
    if (function)
      for (const auto& [name, tensor] : function->parameters()) take(tensor);
  for (const auto& [name, weight] : weights_) take(weight);
  return recomputed(
      [this, layer, pass = pass_](const at::Tensor& input) {
        const PassScope scope(*this, pass);  // gradients are taken when the pass of the first time is over
        return layer(input);
      },
      x, leaves);
}

Weights Backbone::frozen_weights(at::Device device) const {
  Weights frozen{{}, dtype_};
  for (const auto& [name, tensor] : weights_) frozen.tensors.emplace(name, tensor.detach().to(device));
  return frozen;
}

Weights Backbone::weights_plus(const NamedTensors& deltas) const {
  Weights changed = frozen_weights(device());
  for (const auto& [name, delta] : deltas) {
    const auto at = changed.tensors.find(name);
    if (at == changed.tensors.end() || at->second.sizes() != delta.sizes())
      throw core::UserError(
          fmt::format("models: a change of '{}' [{}] does not fit this model", name, fmt::join(delta.sizes(), ", ")),
          "use the base model that the change was made for");
    at::Tensor& weight = at->second;
    weight = (weight.to(c10::promoteTypes(weight.scalar_type(), at::kFloat)) + delta.detach().to(weight.device()))
                 .to(weight.scalar_type());
  }
  return changed;
}

TokenLoss Backbone::token_loss(const Input&, const at::Tensor&, const TokenLossOptions&) {
  throw core::UserError("models: this model predicts no tokens", "use a decoder");
}

std::unique_ptr<Backbone> Backbone::with_tensors(const std::vector<core::TensorView>& tensors,
                                                 const std::string& origin,
                                                 const std::shared_ptr<const void>& owner) const {
  NamedShapes shapes;
  for (const auto& [name, weight] : weights_) shapes.emplace_back(name, weight.sizes().vec());
  return with_weights(match_weights(shapes, tensors, origin, dtype_, owner));
}

NamedTensors Backbone::make_trainable() {
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
