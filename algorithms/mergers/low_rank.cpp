#include "algorithms/mergers/low_rank.h"

#include <algorithm>

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/linalg_qr.h>
#include <ATen/ops/linalg_svd.h>
#include <ATen/ops/matmul.h>

#include "core/error.h"

namespace moraine::algorithms::mergers {

Decomposition svd_of_product(const at::Tensor& b, const at::Tensor& a) {
  const auto [qb, rb] = at::linalg_qr(b, "reduced");
  const auto [qa, ra] = at::linalg_qr(a.t(), "reduced");
  const auto [u, s, vt] = at::linalg_svd(at::matmul(rb, ra.t()), /*full_matrices=*/false);
  return {at::matmul(qb, u), s, at::matmul(vt, qa.t())};
}

Merged leading(const Decomposition& parts, int64_t rank) {
  const int64_t all = parts.s.size(0), kept = std::min(rank, all);
  const at::Tensor squares = parts.s.square();
  Merged merged{adapters::Factored{
      {{parts.u.narrow(1, 0, kept) * parts.s.narrow(0, 0, kept), parts.vt.narrow(0, 0, kept).contiguous()}}}};
  merged.norm2 = squares.sum().item<double>();
  merged.lost2 = squares.narrow(0, kept, all - kept).sum().item<double>();
  return merged;
}

Pair weighted_side_by_side(std::span<const Contribution> contributions) {
  std::vector<at::Tensor> b, a;
  for (const Contribution& contribution : contributions) {
    const Pair pair = pair_of(contribution);
    b.push_back(pair.b);
    a.push_back(pair.a * (contribution.weight * contribution.factors->scale));
  }
  return {at::cat(b, 1), at::cat(a, 0)};
}

at::Tensor weighted_sum(std::span<const Contribution> contributions) {
  at::Tensor sum = change_of(contributions.front()).mul(contributions.front().weight);
  for (const Contribution& contribution : contributions.subspan(1))
    sum.add_(change_of(contribution), contribution.weight);
  return sum;
}

bool all_have_factors(std::span<const Contribution> contributions) {
  return std::ranges::all_of(contributions, [](const Contribution& one) { return one.factors.has_value(); });
}

int64_t rank_of_result(std::span<const Contribution> contributions, const MergeConfig& config,
                       const std::string& slot) {
  if (config.rank) return *config.rank;
  int64_t largest = 0;
  for (const Contribution& contribution : contributions) largest = std::max(largest, rank_of(contribution));
  if (largest > 0) return largest;
  if (contributions.front().dense.size(1) == 1) return 1;  // a bias, which has no more
  throw core::UserError(fmt::format("algorithms/mergers: no adapter's change of {} has a rank", slot),
                        "give the rank of the result");
}

}  // namespace moraine::algorithms::mergers
