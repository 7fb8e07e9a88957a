#pragma once

#include "kernels/route.h"
#include "kernels/types.h"

namespace moraine::kernels {

/// Adds every token's chosen experts to a frozen linear map's output, ranks may differ per expert.
///
///   u_p = A_e x_t                           p = (t, j), e = index[t, j]
///   y_t = y0_t + sum_j w_p Bt_e^T u_p       w_p = g_p s_e;  a dense expert: y_t = y0_t + sum_j w_p A_e x_t
///
/// Shapes: x [T, d_in], y0 and y [T, d_out] of the experts' dtype (y may be y0; y0.data null stands for 0), gates [T,
/// k] of the accumulate type. Sums are kept in the accumulate type, slots are added in slot order, y is rounded once.
/// Empty slots and rank-0 experts contribute nothing at all: y is then y0 bit for bit.
struct DeltaForward {
  const RaggedExperts* experts = nullptr;
  const Route* route = nullptr;
  const void* gates = nullptr;
  ConstRows x, y0;
  Rows y;
  void* saved_u = nullptr;  // optional, delta_saved_bytes(): u_p unscaled, for backward
};

/// Gradients of DeltaForward. Outputs that are null are not computed.
///
///   v_p = Bt_e dy_t;  dg_p = s_e <u_p, v_p>;  dx_t = dx0_t + sum_j w_p A_e^T v_p
///   dA_e = sum_p w_p v_p (x) x_t;   dBt_e = sum_p w_p u_p (x) dy_t
///
/// Shapes: dy [T, d_out], dx0 and dx [T, d_in] in the experts' dtype; dgates [T, k], da [R, d_in], dbt [R, d_out] in
/// the accumulate type. dgates of empty slots and rank-0 experts are 0. grads: how da and dbt are written.
struct DeltaBackward {
  const RaggedExperts* experts = nullptr;
  const Route* route = nullptr;
  const void* gates = nullptr;
  ConstRows x, dy, dx0;
  const void* saved_u = nullptr;
  Rows dx;
  void* dgates = nullptr;
  void* da = nullptr;
  void* dbt = nullptr;
  WeightGrads grads = WeightGrads::kOverwrite;
};

/// Bytes of saved_u for a route of that many pairs (an upper bound; the ragged buffer is packed).
size_t delta_saved_bytes(const RaggedExperts& experts, int64_t pairs, Device device);
size_t delta_forward_workspace(const RaggedExperts& experts, int64_t tokens, int64_t slots, const Exec& exec);
size_t delta_backward_workspace(const RaggedExperts& experts, int64_t tokens, int64_t slots, const Exec& exec);

/// Throw NumericError for a gate that is not finite; UserError for a path this processor lacks; InternalError for
/// shapes, offsets, dtypes, alignment or workspaces that do not fit. Thread-safe with separate workspaces; CUDA work is
/// only enqueued.
void delta_forward(const DeltaForward& args, Workspace workspace, const Exec& exec);
void delta_backward(const DeltaBackward& args, Workspace workspace, const Exec& exec);

}  // namespace moraine::kernels
