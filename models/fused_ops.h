#pragma once

#include <ATen/core/Tensor.h>

namespace moraine::models {

/// When the normalised value is rounded to x's dtype: after the weight was multiplied in float32 (OLMo2) or before, so
/// that the product is rounded again (Llama). No difference in float32.
enum class NormRounding { kAfterWeight, kBeforeWeight };

/// y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, statistics in float32 (float64 for float64 input).
///
/// Shapes: x [..., d], weight [d]; float32, bfloat16 or float64, both alike. One pass forward and one backward on the
/// CPU; other devices take rms_norm_reference. The weight's gradient is only computed when it is asked for, and is
/// summed in blocks of fixed size: the bits do not depend on the number of threads. First derivatives only.
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps, NormRounding rounding);

/// The same out of ATen operators: the oracle, and the path of devices without a fused form.
at::Tensor rms_norm_reference(const at::Tensor& x, const at::Tensor& weight, double eps, NormRounding rounding);

/// Rotary position embedding, half-split as in Hugging Face models: the pair (x[i], x[i + D/2]) turns by the angle of
/// (t, i).
///
/// Shapes: x [B, T, H, D], cos and sin [T', D/2] float32, T' >= T; returns [B, T, H, D] in x's dtype, computed in
/// float32 (float64 for float64 input). First derivatives only, with respect to x.
at::Tensor rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin);

/// The same out of ATen operators.
at::Tensor rotate_reference(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin);

}  // namespace moraine::models
