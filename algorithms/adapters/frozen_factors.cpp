#include "algorithms/adapters/frozen_factors.h"

#include <utility>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros.h>
#include <c10/core/ScalarType.h>

namespace moraine::algorithms::adapters {

FrozenFactors frozen_factors(const SlotInit& init, double scale) {
  const models::Slot& slot = init.target.slot;
  return {at::zeros({init.target.rank, slot.in}, at::kFloat), at::zeros({slot.out, init.target.rank}, at::kFloat),
          scale, init.config.dropout, slot.path};
}

Counts frozen_factors_count(std::span<const Target> targets) {
  int64_t trained = 0;
  for (const Target& target : targets) trained += target.rank * target.rank;
  return {trained, trained + lora_parameters(targets)};
}

FrozenFactorsSlot::FrozenFactorsSlot(at::Tensor r, FrozenFactors frozen)
    : r_(std::move(r)), frozen_(std::move(frozen)) {}

at::Tensor FrozenFactorsSlot::forward(const at::Tensor& x, const models::SlotBase& base, const models::Pass& pass) {
  const at::Tensor y = base.forward(x);
  const at::ScalarType type = c10::promoteTypes(at::kFloat, x.scalar_type());
  const at::Tensor in = dropped(x.to(type), frozen_.dropout, pass, frozen_.path);
  const at::Tensor inner = at::linear(at::linear(in, frozen_.a.to(type)), r_.to(type));
  return y.add(at::linear(inner, frozen_.b.to(type)), frozen_.scale).to(y.scalar_type());
}

models::NamedTensors FrozenFactorsSlot::peft_tensors() const {
  const at::NoGradGuard no_grad;
  return {{"lora_A.weight", frozen_.a}, {"lora_B.weight", at::matmul(frozen_.b, r_)}};
}

std::optional<at::Tensor> FrozenFactorsSlot::delta(const models::SlotBase& base) const {
  const Factored factors = *factored(base);
  return at::matmul(factors.parts[0].first, factors.parts[0].second).mul(factors.scale);
}

std::optional<Factored> FrozenFactorsSlot::factored(const models::SlotBase&) const {
  const at::NoGradGuard no_grad;
  return Factored{{{at::matmul(frozen_.b, r_), frozen_.a}}, frozen_.scale};
}

}  // namespace moraine::algorithms::adapters
