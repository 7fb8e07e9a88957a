#include "algorithms/mergers/merger.h"

#include <algorithm>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/matmul.h>

#include "core/error.h"

namespace moraine::algorithms::mergers {
namespace {

at::Tensor in_double(const at::Tensor& tensor) { return tensor.detach().to(at::kCPU, at::kDouble); }

bool is_finite(const Contribution& contribution) {
  const auto finite = [](const at::Tensor& tensor) { return at::isfinite(tensor).all().item<bool>(); };
  if (!contribution.factors) return finite(contribution.dense);
  return std::ranges::all_of(contribution.factors->parts,
                             [&](const auto& part) { return finite(part.first) && finite(part.second); });
}

void check(std::span<const Contribution> contributions, const Merger& merger, const std::string& slot) {
  MORAINE_CHECK(!contributions.empty(), "nothing to merge at {}", slot);
  for (const Contribution& contribution : contributions) {
    MORAINE_CHECK(contribution.factors.has_value() != contribution.dense.defined(),
                  "'{}' must have factors or a dense change at {}", contribution.name, slot);
    if (!contribution.factors && !merger.traits().takes_dense)
      throw core::UserError(
          fmt::format("algorithms/mergers: type {} works on factors, and the change of {} by '{}' has none",
                      merger.name(), slot, contribution.name),
          "types that end in _svd or _dense, svd and concat take any change of weights");
    if (!is_finite(contribution))
      throw core::UserError(
          fmt::format("algorithms/mergers: the change of {} by '{}' is not finite", slot, contribution.name),
          "the file is damaged, or its training failed");
  }
}

}  // namespace

at::Tensor Merged::change() const {
  if (!factors) return dense;
  const auto& [b, a] = factors->parts.front();
  return at::matmul(b, a).mul_(factors->scale);
}

Merged Merger::merge(std::span<const Contribution> contributions, const MergeConfig& config,
                     const std::string& slot) const {
  const at::NoGradGuard no_grad;
  check(contributions, *this, slot);
  return merge_checked(contributions, config, slot);
}

Pair pair_of(const Contribution& contribution) {
  std::vector<at::Tensor> b, a;
  for (const auto& [left, right] : contribution.factors->parts) {
    b.push_back(in_double(left));
    a.push_back(in_double(right));
  }
  return {at::cat(b, 1), at::cat(a, 0)};
}

int64_t rank_of(const Contribution& contribution) {
  int64_t rank = 0;
  if (contribution.factors)
    for (const auto& [b, a] : contribution.factors->parts) rank += a.size(0);
  return rank;
}

at::Tensor change_of(const Contribution& contribution) {
  if (!contribution.factors) return in_double(contribution.dense);
  const Pair pair = pair_of(contribution);
  return at::matmul(pair.b, pair.a).mul_(contribution.factors->scale);
}

}  // namespace moraine::algorithms::mergers
