#pragma once

#include <vector>

#include "algorithms/adapters/parametrisation.h"

namespace moraine::algorithms::adapters {

/// MatryoshkaLoRA: one LoRA of rank R of which every first k ranks work, all trained at every step. In training
///
///   y = base(x) + sum over r in S of s_r (z A[:r]^T) B[:, :r]^T = base(x) + (z A^T diag(P)) B^T,   z = drop(x),
///   P_i = sum over r in S with r >= i of s_r,   s_r = alpha / r, or alpha / sqrt(r) with use_rslora;
///
/// evaluation, merging and export use s_R (x A^T) B^T, as Adapter::truncated(k) uses s_k with the first k ranks: even
/// at k = R another function than the trained one, unless `as_trained` keeps P. Shapes: A [R, in], B [out, R], P [R].
/// Trained: A and B; P is neither trained nor stored.
///
/// Options: ranks, S (empty: the powers of two below R, and R; R itself is (inferred) where it is no power of two);
/// as_trained (false); wide_start (true: A of init kaiming starts in U(+-1/sqrt(R)), as the authors' code has it;
/// false: in U(+-1/sqrt(in)), as LoRA). The paper has no alpha: alpha 1 with use_rslora is its "sqrt", without it its
/// "rank". The same ranks in all slots, so no rank_pattern.
/// Source: MatryoshkaLoRA (arXiv 2605.07850), algorithm 1; IST-DASLab/MatryoshkaLoRA.
const Parametrisation& matryoshka();

/// P_i / s_R of i = 1 .. R, where R is `rank`.
std::vector<double> matryoshka_weights(const std::vector<int64_t>& ranks, int64_t rank, bool use_rslora);

}  // namespace moraine::algorithms::adapters
