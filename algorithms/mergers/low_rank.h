#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include "algorithms/mergers/merger.h"

namespace moraine::algorithms::mergers {

/// U diag(s) V^T = b a by QR decompositions of b and a^T and the SVD of a small matrix: never dense.
///
/// Shapes: b [out, R], a [R, in], float64; u [out, k], s [k] falling, vt [k, in], k = min(R, in, out). Work grows as
/// R^2 (in + out).
struct Decomposition {
  at::Tensor u, s, vt;
};
Decomposition svd_of_product(const at::Tensor& b, const at::Tensor& a);

/// The leading `rank` singular triplets, b = U s and a = V^T as PEFT keeps them; fewer where there are no more.
Merged leading(const Decomposition& parts, int64_t rank);

/// The weighted sum of changes that all have factors, exactly, side by side: b = [b_1 ...], a = [w_1 s_1 a_1; ...].
Pair weighted_side_by_side(std::span<const Contribution> contributions);
/// The weighted sum as a matrix, [out, in] float64.
at::Tensor weighted_sum(std::span<const Contribution> contributions);
bool all_have_factors(std::span<const Contribution> contributions);

/// MergeConfig::rank, or the largest among the contributions. Throws UserError when there is neither.
int64_t rank_of_result(std::span<const Contribution> contributions, const MergeConfig& config, const std::string& slot);

}  // namespace moraine::algorithms::mergers
