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

// What types with `init: eva` answer (Parametrisation): the option `examples`, 64, means something there alone.
core::Json eva_options();
Wants eva_wants(const AdapterConfig& config);
std::optional<std::string> eva_problem(const AdapterConfig& config);

/// A and B as init.config.init says; A of kaiming and gaussian depends on seed and path alone. eva (EVA, arXiv
/// 2410.07170, section 3): the rows of A are the r leading right singular vectors of the slot's inputs over the first
/// `examples` examples of training, that is the leading eigenvectors of SlotInit::input_moments, found in float64; the
/// strongest first, orthonormal. Inputs are taken as they are, where PEFT subtracts their mean first; ranks are not
/// redistributed over the slots (PEFT's rho = 1). Throws UserError when the examples have fewer independent inputs than
/// r.
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

/// LoRA, rsLoRA, PiSSA, OLoRA and EVA.
const Parametrisation& lora();

}  // namespace moraine::algorithms::adapters
