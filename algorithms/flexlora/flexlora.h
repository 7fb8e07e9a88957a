#pragma once

#include "algorithms/register.h"

namespace moraine::algorithms::flexlora {

/// FlexLoRA: the server averages the changes, not the factors, and gives every client the leading singular directions:
///   dW = s sum_k p_k B_k A_k = U S V^T;   global A = V_r^T,  B = U_r S_r / s,   r the largest of the clients' ranks;
/// a client of rank r_k is sent the first r_k of them, the best approximation of dW of that rank. Exact before it is
/// cut. Up and down: r_k (in + out) numbers per matrix. dW is never formed: [s p_k B_k] = Q_B R_B, [A_k^T] = Q_A R_A,
/// and R_B R_A^T, R x R with R the sum of the ranks, is decomposed (our algebra; the authors' code forms dW). Where the
/// clients of a round have fewer ranks than r together, the global A keeps its rows there, with B = 0 (inferred).
/// Sums in double. Source: FlexLoRA (arXiv 2402.11505), algorithm 1.
MethodEntry method_entry();

}  // namespace moraine::algorithms::flexlora
