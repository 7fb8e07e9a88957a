#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

namespace moraine::models {

struct FfnExpert;
struct ExpertSlabs;

/// Frozen experts in the kernels' layout, kept from one ragged_ffn to the next: without it every call copies all
/// weights, also those of experts nobody chose. Holds a copy of the low-rank weights and references to the originals.
/// Packed anew when a weight is another tensor or was changed by an in-place operation; writing through a data pointer
/// goes unseen. Not thread-safe.
struct PackedExperts {
  std::shared_ptr<const ExpertSlabs> slabs;
  std::vector<at::Tensor> parts;
  std::vector<uint32_t> versions;
  std::vector<int64_t> has_parts;  // [experts]
};

/// Differentiable form of the ragged-rank FFN kernels (kernels/ffn_expert.h): all low-rank experts of one mixture layer
/// and the public one in one pass, whatever their ranks.
///
///   h_p = silu(gate_base_t + B_g A_g x_t) * (up_base_t + B_u A_u x_t),  p = (t, j), e = index[t, j]
///   hidden_sum_t = sum_j g_p h_p;   y_delta_t = sum_j g_p B_d (A_d h_p)
///
/// Shapes: x [T, d], gate_base and up_base [T, h], gates [T, k] (float32; float64 beside float64 x), index [T, k] int32
/// into `experts` or -1 (contributes nothing); an expert that is null has no correction. Returns {hidden_sum [T, h],
/// y_delta [T, d]} in x's dtype. dtype: float32, bfloat16 or float64; weights of another dtype are cast at use, their
/// gradients are kept in float32 (float64) until they are cast to the weight's own; an expert no token chose gets none
/// (undefined, not zeros). First derivatives only, with respect to x, both bases, gates and weights. CPU only; the bits
/// do not depend on the number of threads. Throws InternalError for other devices and dtypes, NumericError for a gate
/// that is not finite. Thread-safe with a `kept` of its own (null: nothing is kept); it is used where no weight
/// requires gradients.
std::pair<at::Tensor, at::Tensor> ragged_ffn(const at::Tensor& x, const at::Tensor& gate_base,
                                             const at::Tensor& up_base, const at::Tensor& gates,
                                             const at::Tensor& index, const std::vector<const FfnExpert*>& experts,
                                             PackedExperts* kept = nullptr);

/// Whether ragged_ffn computes on this device and in this dtype.
bool ragged_ffn_covers(const at::Tensor& x);

}  // namespace moraine::models
