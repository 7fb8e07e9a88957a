#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

#include "algorithms/flexmore/experts.h"
#include "models/decoder.h"
#include "models/mixture.h"

namespace moraine::algorithms::flexmore {

/// What the recipe's `comparisons` may list, each measured in the same run as the mixture.
inline const std::vector<std::string> kComparisons = {"btm",        "cross_domain", "joint", "random_subspace",
                                                      "rank_sweep", "scaled_delta"};

/// Shares of the full-size change that `scaled_delta` keeps.
inline constexpr double kScales[] = {0.25, 0.5, 0.75};

/// Weights of branch-train-merge: P(e | x_<t) by Bayes' rule from running likelihoods and a uniform prior, the `top`
/// largest kept and renormalised.
///
/// Shapes: log_likelihood [E, B, T], log p_e(x_t | x_<t) of the token that came (0 where there is none); returns [E, B,
/// T] float64, where the weights at t depend on tokens before t alone. Ties go to the smaller e. Source: the baseline
/// "BTM" of FlexOlmo (arXiv 2507.07024): p(x_t) = sum_e P(e | x_<t) p_e(x_t), top 2.
at::Tensor posterior_weights(const at::Tensor& log_likelihood, int64_t top);

/// Next-token loss of sum_e w_e p_e over `sequences` [B, T + 1] (as Decoder::loss, without gradients), w as above;
/// every sequence starts from the prior.
models::TokenLoss branch_train_merge_loss(std::vector<models::Decoder>& members, const at::Tensor& sequences,
                                          int64_t top);

/// A full-size expert that keeps `scale` of its change: W_0 + scale (W_e - W_0), row and biases as they are.
Expert with_scaled_change(Expert expert, const models::Decoder& base, double scale);

/// The control for PHLoRA: what is left of a change D = tuned - base in a random subspace of its inputs, D Q Q^T with Q
/// [in, rank] orthonormal; A = Q^T, B = D Q. Directions are nested: the first r' rows of A and columns of B are the
/// control at rank r' of the same seed. rank in 1..in, else UserError.
models::LowRank random_subspace_of(const at::Tensor& tuned, const at::Tensor& base, int64_t rank, uint64_t seed);

/// y = intercept + slope x by least squares; r2 is the share of y's variance it explains (1 when y does not vary).
struct Line {
  double slope = 0, intercept = 0, r2 = 1;
};
/// Throws InternalError on fewer than two different x.
Line least_squares_line(const std::vector<std::pair<double, double>>& points);

}  // namespace moraine::algorithms::flexmore
