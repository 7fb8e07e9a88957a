#include "algorithms/mergers/svd.h"

#include <ATen/ops/linalg_svd.h>

#include "algorithms/mergers/low_rank.h"

namespace moraine::algorithms::mergers {
namespace {

class Svd final : public Merger {
 public:
  std::string name() const override { return "svd"; }
  std::string summary() const override { return "the weighted sum, cut to a rank by its SVD (PEFT's svd)"; }
  Traits traits() const override { return {.rank = true, .takes_dense = true}; }

 protected:
  Merged merge_checked(std::span<const Contribution> contributions, const MergeConfig& config,
                       const std::string& slot) const override {
    const int64_t rank = rank_of_result(contributions, config, slot);
    if (all_have_factors(contributions)) {
      const Pair pair = weighted_side_by_side(contributions);
      return leading(svd_of_product(pair.b, pair.a), rank);
    }
    const auto [u, s, vt] = at::linalg_svd(weighted_sum(contributions), /*full_matrices=*/false);
    return leading({u, s, vt}, rank);
  }
};

}  // namespace

const Merger& svd() {
  static const Svd instance;
  return instance;
}

}  // namespace moraine::algorithms::mergers
