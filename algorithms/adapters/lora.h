#pragma once

#include <string>
#include <string_view>

#include "algorithms/adapters/parametrisation.h"

namespace moraine::algorithms::adapters {

/// LoRA on one linear slot: y = base(x) + scale * (drop(x) A^T) B^T.
///
/// Shapes: A [r, in], B [out, r], x [..., in]. The update is computed in the widest of float32, x's and the factors'
/// dtype, and the sum is cast back to the base's: what type an adapter is stored in does not decide how it is applied.
/// So float32 factors of a bfloat16 model are applied in float32, as in PEFT. B = 0 leaves the base's output unchanged
/// bit for bit. Start values that are taken from the base (PiSSA, OLoRA) do not change it: what they start from stays
/// beside as A0, B0, and the update is scale * (B A - B0 A0), of rank 2 r.
/// Source: LoRA (arXiv 2106.09685), equation 3.
class LoraSlot : public SlotAdapter {
 public:
  struct Options {
    double scale = 1, dropout = 0;
    std::string path = {};  // of the slot: which values are dropped depends on it
  };
  LoraSlot(at::Tensor a, at::Tensor b, Options options, at::Tensor a0 = {}, at::Tensor b0 = {});
  at::Tensor forward(const at::Tensor& x, const models::SlotBase& base, const models::Pass& pass = {}) override;
  /// "lora_A.weight", "lora_B.weight".
  models::NamedTensors parameters() const override;
  /// "lora_A0", "lora_B0" if there are any.
  models::NamedTensors state() const override;
  std::optional<at::Tensor> delta(const models::SlotBase& base) const override;
  std::optional<Factored> factored(const models::SlotBase& base) const override;
  models::NamedTensors peft_tensors() const override;

 protected:
  /// scale * (drop(x) A^T) B^T, in at least float32.
  at::Tensor update(const at::Tensor& x, const models::Pass& pass) const;
  at::ScalarType compute_type() const;

  at::Tensor a_, b_, a0_, b0_;
  Options options_;
};

/// A and B as init.config.init says. A of kaiming, gaussian and orthogonal depends on seed and path alone.
struct LoraFactors {
  at::Tensor a, b;
  bool from_base = false;  // B A is not zero: it is a part of the base
};
LoraFactors first_factors(const SlotInit& init);

/// Of pairs A and B: B averages exactly while A is held; ranks are the rows of A and the columns of B.
TensorTraits pair_traits(std::string_view name);

/// adapter_config.json's fields of a LoRA or DoRA.
core::Json lora_peft_config(const AdapterConfig& config);
AdapterConfig lora_config_from_peft(const core::OrderedJson& json, const std::string& origin);

/// LoRA, rsLoRA, PiSSA and OLoRA.
const Parametrisation& lora();

}  // namespace moraine::algorithms::adapters
