#pragma once

#include <span>
#include <string>

#include "algorithms/adapters/parametrisation.h"

namespace moraine::algorithms::adapters {

// What LoRA-XS and LoRA-SB share: a small trained matrix between two frozen factors.

/// A [r, in] and B [out, r], stored but not trained.
struct FrozenFactors {
  at::Tensor a, b;
  double scale = 1, dropout = 0;
  std::string path = {};
};

/// Zeros of the slot's shapes on the CPU, for values that come later.
FrozenFactors frozen_factors(const SlotInit& init, double scale);
/// r^2 trained; stored beside them A and B.
Counts frozen_factors_count(std::span<const Target> targets);

/// y = base(x) + scale * (drop(x) A^T) R^T B^T, that is delta W = scale * B R A; trained: R [r, r].
class FrozenFactorsSlot final : public SlotAdapter {
 public:
  FrozenFactorsSlot(at::Tensor r, FrozenFactors frozen);
  at::Tensor forward(const at::Tensor& x, const models::SlotBase& base, const models::Pass& pass) override;
  models::NamedTensors parameters() const override { return {{"lora_R", r_}}; }
  models::NamedTensors state() const override { return {{"lora_A", frozen_.a}, {"lora_B", frozen_.b}}; }
  /// A LoRA of the same scale: A, and B R as its B.
  models::NamedTensors peft_tensors() const override;
  std::optional<at::Tensor> delta(const models::SlotBase& base) const override;
  std::optional<Factored> factored(const models::SlotBase&) const override;

 private:
  at::Tensor r_;
  FrozenFactors frozen_;
};

}  // namespace moraine::algorithms::adapters
