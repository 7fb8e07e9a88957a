#pragma once

#include "kernels/route.h"
#include "kernels/types.h"

namespace moraine::kernels {

/// Low-rank experts of a gated FFN, evaluated in the exact factored form: the frozen FFN is paid once per token.
///
///   a_p = (Wg x_t) + s_e Btg_e^T Ag_e x_t;   b_p likewise with `up`;   h_p = silu(a_p) * b_p
///   y_t = Wd (sum_j g_p h_p) + sum_j g_p s_e Btd_e^T Ad_e h_p
///
/// The three frozen products are the caller's, on T rows, with whatever BLAS is best there: gate_base = X Wg^T and
/// up_base = X Wu^T before ffn_forward, y = hidden_sum Wd^T + y_delta after it. Rank 0 in all three projections is the
/// public expert; full-size experts are routed elsewhere (index -1 here).
///
/// Shapes: x [T, d], gate_base, up_base, hidden_sum [T, f], y_delta [T, d], gates [T, k]; gate and up experts d -> f,
/// down experts f -> d; one dtype throughout, ranks may differ per projection. Source: FlexMoRE (arXiv 2602.08818),
/// router weights not renormalised; the factored form is our algebra.
struct FfnExperts {
  RaggedExperts gate, up, down;
};

/// What backward needs of forward, caller-owned (ffn_saved_sizes()).
struct FfnSaved {
  void* a = nullptr;  // [P, f] in the experts' dtype, indexed by pair; rows of empty slots are not written
  void* b = nullptr;
  void* u_gate = nullptr;
  void* u_up = nullptr;
  void* u_down = nullptr;
};
struct FfnSavedSizes {
  size_t a = 0, b = 0, u_gate = 0, u_up = 0, u_down = 0;
};

struct FfnForward {
  const FfnExperts* experts = nullptr;
  const Route* route = nullptr;
  const void* gates = nullptr;
  ConstRows x, gate_base, up_base;
  Rows hidden_sum, y_delta;
  const FfnSaved* saved = nullptr;  // null in inference
};

/// Gradients of the factored form. The caller brings q = dY Wd [T, f] and finishes dX = dgate_base Wg + dup_base Wu +
/// dx_delta.
///
///   dg_p = <h_p, q_t> + s_e <u_down, v_down>;   dh_p = g_p (q_t + s_e Ad_e^T v_down),  v_down = Btd_e dy_t
///   da_p = dh_p b_p sg (1 + a_p (1 - sg)),  sg = sigmoid(a_p);   db_p = dh_p a_p sg;   dgate_base_t = sum_j da_p, ...
///
/// Shapes as forward; weight gradients in the accumulate type; null outputs are not computed. grads as in
/// DeltaBackward.
struct FfnBackward {
  const FfnExperts* experts = nullptr;
  const Route* route = nullptr;
  const void* gates = nullptr;
  ConstRows x, dy, q;
  const FfnSaved* saved = nullptr;
  Rows dgate_base, dup_base, dx_delta;
  void* dgates = nullptr;
  void *da_gate = nullptr, *dbt_gate = nullptr;
  void *da_up = nullptr, *dbt_up = nullptr;
  void *da_down = nullptr, *dbt_down = nullptr;
  WeightGrads grads = WeightGrads::kOverwrite;
};

FfnSavedSizes ffn_saved_sizes(const FfnExperts& experts, int64_t pairs, Device device);
size_t ffn_forward_workspace(const FfnExperts& experts, int64_t tokens, int64_t slots, const Exec& exec);
size_t ffn_backward_workspace(const FfnExperts& experts, int64_t tokens, int64_t slots, const Exec& exec);

/// Errors and threads as delta_forward and delta_backward.
void ffn_forward(const FfnForward& args, Workspace workspace, const Exec& exec);
void ffn_backward(const FfnBackward& args, Workspace workspace, const Exec& exec);

}  // namespace moraine::kernels
