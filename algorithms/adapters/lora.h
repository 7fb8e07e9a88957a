#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "algorithms/adapters/lora_config.h"
#include "models/backbone.h"
#include "models/slot.h"

namespace moraine::algorithms::adapters {

/// LoRA on one linear slot: y = base(x) + scale * (x A^T) B^T.
///
/// Shapes: A [r, in], B [out, r], x [..., in]. The update is computed in the widest of float32, x's and the factors'
/// dtype, and the sum is cast back to the base's: what type an adapter is stored in does not decide how it is applied.
/// So float32 factors of a bfloat16 model are applied in float32, as in PEFT. B = 0 leaves the base's output unchanged
/// bit for bit.
/// Source: LoRA (arXiv 2106.09685), equation 3.
class LoraLinear : public models::SlotFunction {
 public:
  LoraLinear(at::Tensor a, at::Tensor b, double scale);
  at::Tensor forward(const at::Tensor& x, const models::SlotBase& base) override;
  /// "lora_A.weight", "lora_B.weight".
  models::NamedTensors parameters() const override;
  /// scale * B A, [out, in], in the factors' dtype, at least float32.
  at::Tensor delta() const;

 private:
  at::Tensor a_, b_;
  double scale_;
};

/// A LoRA adapter of a whole model: factors for every selected slot. Trained: A and B; frozen: everything else.
/// A worker sends lora_parameters() numbers. Not thread-safe.
class LoraAdapter {
 public:
  /// Fresh factors that require gradients, float32 on `device`. A of a slot depends on `seed` and the slot's path
  /// alone, B is 0. Throws UserError as lora_targets().
  static LoraAdapter create(const LoraConfig& config, std::span<const models::Slot> slots, uint64_t seed,
                            at::Device device);
  /// Reads a PEFT directory: adapter_config.json and adapter_model.safetensors. `dtype` converts; nullopt keeps the
  /// file's. Factors require gradients. Throws UserError listing every tensor that is missing, left over or of the
  /// wrong shape, if the file differs from the SHA256SUMS beside it, and as lora_config_from_peft().
  static LoraAdapter load(const std::filesystem::path& directory, std::span<const models::Slot> slots,
                          std::optional<at::ScalarType> dtype, at::Device device);

  /// Writes a PEFT directory (metadata format "pt", config with sorted keys and indent 2). What load() read is written
  /// back unchanged: every field of the configuration, every tensor byte. A non-empty `base_model` is entered as
  /// base_model_name_or_path.
  void save(const std::filesystem::path& directory, const std::string& base_model = "") const;

  /// Takes over the selected slots of `model`. Throws InternalError if one is taken.
  void attach(models::Backbone& model) const;
  /// Restores the frozen functions.
  void detach(models::Backbone& model) const;

  const std::vector<LoraTarget>& targets() const { return targets_; }
  /// "<slot path>.lora_A.weight" and ".lora_B.weight", sorted by name.
  models::NamedTensors parameters() const;
  /// Dense change of every selected slot, "<slot path>.weight", sorted by name: base weight + delta = merged weight.
  models::NamedTensors deltas() const;

 private:
  std::vector<LoraTarget> targets_;
  std::vector<std::shared_ptr<LoraLinear>> functions_;  // parallel to targets_
  core::Json peft_;                                     // adapter_config.json, unknown fields included
  LoraConfig config_ = {};                              // of a file: its patterns in their order
};

}  // namespace moraine::algorithms::adapters
