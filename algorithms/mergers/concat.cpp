#include "algorithms/mergers/concat.h"

#include "algorithms/mergers/low_rank.h"

namespace moraine::algorithms::mergers {
namespace {

class Concat final : public Merger {
 public:
  std::string name() const override { return "concat"; }
  std::string summary() const override { return "the exact weighted sum; ranks add up (PEFT's cat)"; }
  Traits traits() const override { return {.takes_dense = true}; }

 protected:
  Merged merge_checked(std::span<const Contribution> contributions, const MergeConfig&,
                       const std::string&) const override {
    if (!all_have_factors(contributions)) return {std::nullopt, weighted_sum(contributions)};
    const Pair pair = weighted_side_by_side(contributions);
    return {adapters::Factored{{{pair.b, pair.a}}}};
  }
};

}  // namespace

const Merger& concat() {
  static const Concat instance;
  return instance;
}

}  // namespace moraine::algorithms::mergers
