#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "algorithms/adapters/adapter.h"
#include "core/safetensors.h"
#include "models/decoder.h"

namespace moraine::algorithms::adapters {

// The tiny model that PEFT's golden files are of (scripts/make_lora_golden.py), and what every type of adapter owes.

std::filesystem::path golden_directory();
/// The file's tensors below a prefix, without it.
std::vector<core::TensorView> below(const core::Safetensors& file, const std::string& prefix);
/// lora_golden.safetensors.
const core::Safetensors& golden();
at::Tensor golden_tensor(const std::string& name);
models::Decoder golden_base(std::optional<at::ScalarType> dtype = std::nullopt);
/// A Llama of the same shape with random biases of all linears but lm_head.
models::Decoder base_with_biases();

/// Linear slots of a decoder of width d by shapes alone, and its FFNs.
std::vector<models::Slot> decoder_slots(int64_t layers, int64_t d, int64_t kv, int64_t h);

/// Within 1e-5 of the largest value: float32 on both sides, where only the order of sums differs.
void expect_close(const at::Tensor& actual, const at::Tensor& expected, const std::string& what);

/// Numbers trained and stored by the shapes of real models.
Counts count_of(const AdapterConfig& config, const std::vector<models::Slot>& slots);

/// Made-up gradients and moments for what starts from examples: numbers of the target's place in the list.
Calibration made_up_calibration();

/// A fresh adapter whose trained tensors all got noise.
Adapter trained_adapter(const AdapterConfig& config, const models::Backbone& model, uint64_t seed = 1);

/// The directory of golden/, loaded, has PEFT's logits, loss, gradients and changes of weights, and is written back
/// byte for byte.
void expect_equal_to_peft(const std::string& name);
/// A fresh adapter changes no bit of the logits, in float32 and bfloat16; detaching restores the base.
void expect_zero_at_init(const AdapterConfig& config);
/// Of a fresh adapter every parameter whose name ends with none of `still` has a gradient other than zero, those have
/// zeros, and the model has none.
void expect_gradients(const AdapterConfig& config, const models::Decoder& base, const std::vector<std::string>& still);
/// Weights with deltas() added compute what the attached adapter computes, and factored() is delta().
void expect_merge_is_forward(const AdapterConfig& config, const models::Decoder& base);
/// What to_artefact() wrote holds as many numbers as planned and computes the same bits; float32 and bfloat16 models.
void expect_round_trip(const AdapterConfig& config, const models::Decoder& base);
/// The same seed gives the same bits, whatever else is drawn; `differs`: another seed gives others.
void expect_depends_on_seed(const AdapterConfig& config, bool differs);
/// What every type whose map is linear owes of the above, on models with and without biases, in three dtypes.
void expect_linear_promises(const AdapterConfig& config, const std::vector<std::string>& still, bool differs);
/// A configuration of which only `fields` differ from the defaults, checked as a recipe's.
AdapterConfig checked_config(const core::Json& fields);
/// That fails with `text`.
void expect_refused(const core::Json& fields, const std::string& text);

}  // namespace moraine::algorithms::adapters
