#include "algorithms/flexmore/phlora.h"

#include <algorithm>

#include <ATen/TensorOperators.h>
#include <ATen/ops/linalg_svd.h>
#include <ATen/ops/sqrt.h>

#include "core/error.h"

namespace moraine::algorithms::flexmore {

Spectrum spectrum_of_difference(const at::Tensor& tuned, const at::Tensor& base) {
  const at::Tensor difference = tuned.to(at::kFloat) - base.to(at::kFloat);
  auto [u, s, vh] = at::linalg_svd(difference, /*full_matrices=*/false);
  return {u, s, vh};
}

models::LowRank low_rank_of(const Spectrum& spectrum, int64_t rank) {
  if (rank <= 0) throw core::UserError(fmt::format("algorithms/flexmore: rank must be positive: {}", rank));
  const int64_t r = std::min(rank, spectrum.s.size(0));
  const at::Tensor root = at::sqrt(spectrum.s.narrow(0, 0, r));
  return {(root.unsqueeze(1) * spectrum.vh.narrow(0, 0, r)).contiguous(),
          (spectrum.u.narrow(1, 0, r) * root).contiguous()};
}

models::LowRank slice(const models::LowRank& pair, int64_t rank) {
  const int64_t stored = pair.a.size(0);
  if (rank <= 0 || rank > stored)
    throw core::UserError(
        fmt::format("algorithms/flexmore: rank {} is outside 1..{}, the rank that was shipped", rank, stored),
        "extract again at a higher rank, or ask for a smaller one");
  return {pair.a.narrow(0, 0, rank).contiguous(), pair.b.narrow(1, 0, rank).contiguous()};
}

}  // namespace moraine::algorithms::flexmore
