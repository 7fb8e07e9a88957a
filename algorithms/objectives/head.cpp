#include "algorithms/objectives/head.h"

#include <string>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>
#include <fmt/ranges.h>

#include "core/error.h"
#include "core/hash.h"
#include "models/tensor_io.h"

namespace moraine::algorithms::objectives {

Head Head::fresh(int64_t classes, const models::ModelFacts& model, uint64_t seed, at::Device device) {
  if (classes == 0) return {};
  const at::NoGradGuard no_grad;
  auto generator = at::detail::createCPUGenerator(core::derive_seed(seed, "head"));
  Head head{at::empty({classes, model.width}, at::kFloat).normal_(0, 0.02, generator).to(device), {}};
  if (model.classifier.bias) head.bias = at::zeros({classes}, head.weight.options());
  for (const auto& [name, tensor] : head.tensors()) at::Tensor(tensor).set_requires_grad(true);
  return head;
}

int64_t Head::classes_of(std::span<const core::TensorView> classifier, const models::ModelFacts& model) {
  const core::TensorView *weight = nullptr, *bias = nullptr;
  for (const core::TensorView& tensor : classifier) (tensor.name.ends_with(".bias") ? bias : weight) = &tensor;
  if (classifier.empty()) return 0;
  const bool whole = weight != nullptr && weight->name.ends_with(".weight") && weight->shape.size() == 2 &&
                     classifier.size() == (model.classifier.bias ? 2u : 1u);
  const bool fits =
      whole && weight->shape[1] == model.width && (bias == nullptr || bias->shape == std::vector{weight->shape[0]});
  if (fits && (bias != nullptr) == model.classifier.bias) return weight->shape[0];
  std::vector<std::string> found;
  for (const core::TensorView& tensor : classifier)
    found.push_back(fmt::format("{} [{}]", tensor.name, fmt::join(tensor.shape, ", ")));
  throw core::UserError(fmt::format("algorithms/objectives: no head of this model: {}", fmt::join(found, "; ")),
                        fmt::format("a weight [classes, {}]{} is one", model.width,
                                    model.classifier.bias ? " and a bias [classes]" : ", without a bias,"));
}

Head Head::start(std::span<const core::TensorView> classifier, at::Device device) {
  Head head;
  for (const core::TensorView& tensor : classifier)
    (tensor.name.ends_with(".bias") ? head.bias : head.weight) =
        models::copy_of(tensor).to(device, at::kFloat).set_requires_grad(true);
  return head;
}

int64_t Head::count(int64_t classes, const models::ModelFacts& model) {
  return classes * (model.width + (model.classifier.bias ? 1 : 0));
}

Head Head::read(const core::Artefact& artefact, at::Device device) {
  Head head;
  if (const auto* weight = artefact.file().find("head.weight")) head.weight = models::copy_of(*weight).to(device);
  if (const auto* bias = artefact.file().find("head.bias")) head.bias = models::copy_of(*bias).to(device);
  return head;
}

models::NamedTensors Head::tensors() const {
  models::NamedTensors out;
  if (bias.defined()) out.emplace_back(std::string(kPrefix) + "bias", bias);
  if (weight.defined()) out.emplace_back(std::string(kPrefix) + "weight", weight);
  return out;
}

at::Tensor Head::logits(const at::Tensor& features) const {
  MORAINE_CHECK(weight.defined(), "a classification needs a head");
  return at::linear(features.to(weight.scalar_type()), weight, bias);
}

}  // namespace moraine::algorithms::objectives
