#pragma once

#include "kernels/types.h"

namespace moraine::kernels {

/// Forms W_e = Bt_e^T A_e [d_out, d_in] of every expert with a rank, in the accumulate type; worth it from
/// r_e = d_in d_out / (d_in + d_out) on. Experts of rank 0 give zeros. Scale is not applied.
///
/// weights [E, d_out, d_in]. Backward: dA_e = Bt_e dW_e, dBt_e = A_e dW_e^T; F32 and F64 only,
/// since training through materialised weights keeps its factors in full precision.
/// CPU only: on CUDA experts of such ranks go through the dense products of the caller's BLAS.
void materialise(const RaggedExperts& experts, void* weights, Workspace workspace, const Exec& exec);
void materialise_backward(const RaggedExperts& experts, const void* dweights, void* da, void* dbt, Workspace workspace,
                          const Exec& exec);
size_t materialise_workspace(const RaggedExperts& experts, const Exec& exec);

}  // namespace moraine::kernels
