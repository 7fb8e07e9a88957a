#pragma once

#include "kernels/layout.h"
#include "kernels/route.h"
#include "kernels/types.h"

/// The primitives every operation of this folder is composed of; one table per (CPU family, dtype) and one per CUDA
/// dtype. Arguments have been checked. Pair buffers hold the backend's pair type: the accumulate type on the CPU, the
/// storage type on CUDA.
namespace moraine::kernels {

/// Activation rows read or written through the route: sorted position s uses row perm[s] / divisor, divisor = slots for
/// token rows and 1 for pair rows.
struct PairRows {
  const void* data = nullptr;
  int64_t ld = 0;
  int64_t divisor = 1;
};

/// One product of an expand: sum_i pairs[p, i] * matrix[row_offsets[e] + i, :].
struct ExpandTerm {
  Segments segments;
  const void* pairs = nullptr;
  const void* matrix = nullptr;  // null: the identity (dense experts), pairs are added as they are
};

struct ShrinkArgs {  // out[p, i] = <x_p, matrix[row_offsets[e] + i, :]>
  const Route* route;
  Segments segments;
  PairRows x;
  const void* matrix;  // null: the identity, out[p, :] = x_p
  int64_t width;       // columns of x and matrix
  void* out;
};

struct CombineArgs {  // y_t = y0_t + sum_j weights[p] * (sum of terms)_p
  const Route* route;
  ExpandTerm terms[2];
  int num_terms;
  const void* weights;  // [P] accumulate type, null: 1
  int64_t width;
  ConstRows y0;
  Rows y;
};

struct OuterArgs {  // out[row_offsets[e] + i, :] (+)= sum_p pairs[p, i] * rows_p
  const Route* route;
  Segments segments;
  const void* pairs;
  PairRows rows;
  int64_t width;
  void* out;  // accumulate type
  WeightGrads grads;
};

struct ScalePairsArgs {  // out_u = w u, out_v = w v (either may be null), dot[p] (+)= scale_e <u_p, v_p>
  const Route* route;
  Segments segments;
  const void* u;        // pair type
  const void* v;        // accumulate type: products are rounded once
  const void* weights;  // [P]
  const float* scale;   // [E]
  void* out_u;
  void* out_v;
  void* dot;  // [P] accumulate type or null
  bool accumulate_dot;
};

struct WeightsArgs {  // weighted[p] = gates[p] s_e, scaled[p] = s_e; 0 in empty slots
  const Route* route;
  const void* gates;
  const float* scale;
  void* weighted;
  void* scaled;
};

struct FfnHiddenArgs {  // a = base + s (gate term), b likewise, h = silu(a) b, hidden_sum = sum_j g h
  const Route* route;
  ExpandTerm gate, up;
  const float* gate_scale;  // [E]
  const float* up_scale;
  const void* gates;
  ConstRows gate_base, up_base;
  int64_t width;
  void *a, *b;  // [P, width] storage type; null in inference
  void* h;      // [P, width]
  Rows hidden_sum;
};

struct FfnHiddenBackwardArgs {  // dh = g q + down term; da, db, h [P, width]; their slot sums; dot[p] += <h_p, q_t>
  const Route* route;
  ExpandTerm down;
  const void* gates;
  ConstRows q;
  int64_t width;
  const void *a, *b;
  void *h, *da, *db;
  Rows dgate_base, dup_base;
  void* dot;  // [P]
};

struct MaskArgs {  // masked_u = s u m, masked_v = s v m (pair type), dmask = s u v; each optional
  int64_t tokens, row;
  float scale;
  const void *u, *v, *mask;   // accumulate type
  void *masked_u, *masked_v;  // pair type
  void* dmask;                // accumulate type
};

/// The ranks every token selects, both ways round; row t of a buffer starts at t ld.
struct Selection {
  int64_t tokens, rank, ld;
  const int64_t* token_begin;  // [T+1] into ranks
  const int32_t* ranks;
  const int64_t* rank_begin;  // [R+1] into tokens_of
  const int32_t* tokens_of;
};
struct SelectedShrinkArgs {  // out[t, i] = <x_t, matrix[i, :]> for the selected i, the rest is left alone
  const Selection* selection;
  ConstRows x;
  const void* matrix;
  int64_t width;
  void* out;  // [T, ld] accumulate type
};
struct SelectedExpandArgs {  // y_t = y0_t + sum over selected i of values[t, i] * matrix[i, :]
  const Selection* selection;
  const void* values;  // [T, ld] accumulate type
  const void* matrix;
  int64_t width;
  ConstRows y0;
  Rows y;
};
struct SelectedOuterArgs {  // out[i, :] (+)= sum over the tokens that select i of values[t, i] * x_t
  const Selection* selection;
  const void* values;
  ConstRows x;
  int64_t width;
  void* out;
  bool accumulate;
};
/// What rank-wise activation needs beside the dense primitives; the same bits as those over masked rows.
struct SelectedPrimitives {
  void (*shrink)(const SelectedShrinkArgs&, const Exec&);
  void (*expand)(const SelectedExpandArgs&, const Exec&);
  void (*outer)(const SelectedOuterArgs&, void* scratch, const Exec&);
};

struct Backend {
  size_t pair_size;                           // bytes of one pair-buffer element
  size_t (*segments_bytes)(int64_t experts);  // storage of make_segments
  Segments (*make_segments)(const Route&, const int64_t* row_offsets, int64_t max_rank, void* storage, const Exec&);
  /// Scratch any primitive below may use, for that many pairs and those widest sizes.
  size_t (*scratch_bytes)(int64_t pairs, int64_t max_rank, int64_t max_width);
  void (*weights)(const WeightsArgs&, const Exec&);
  void (*shrink)(const ShrinkArgs&, void* scratch, const Exec&);
  /// As shrink, but out holds the accumulate type: what selection and rank masks read.
  void (*shrink_unrounded)(const ShrinkArgs&, void* scratch, const Exec&);
  void (*combine)(const CombineArgs&, void* scratch, const Exec&);
  void (*outer)(const OuterArgs&, void* scratch, const Exec&);
  void (*scale_pairs)(const ScalePairsArgs&, const Exec&);
  void (*ffn_hidden)(const FfnHiddenArgs&, void* scratch, const Exec&);
  void (*ffn_hidden_backward)(const FfnHiddenBackwardArgs&, void* scratch, const Exec&);
  void (*mask)(const MaskArgs&, const Exec&);
  const SelectedPrimitives* selected = nullptr;  // null: all ranks are computed and masked
};

/// Throws UserError when exec asks for a device or family that is not there, or a dtype the device cannot compute.
const Backend& backend_for(const Exec& exec, DType dtype);

// One function per family; null when this build lacks it or dtype is none of its own.
const Backend* scalar_backend(DType dtype);
const Backend* avx2_backend(DType dtype);
const Backend* avx512_backend(DType dtype);
const Backend* avx512_bf16_backend(DType dtype);
const Backend* cuda_backend(DType dtype);
bool cuda_available();

Route cuda_route_build(const int32_t* index, int64_t tokens, int64_t slots, int64_t experts, Workspace storage,
                       const Exec& exec);
size_t cuda_route_bytes(int64_t tokens, int64_t slots, int64_t experts);
void cuda_zero(void* data, size_t bytes, const Exec& exec);
/// Waits for the stream and throws NumericError if the n accumulate-type gates on the device are not all finite.
void cuda_check_finite(const void* gates, int64_t n, const Exec& exec);

}  // namespace moraine::kernels
