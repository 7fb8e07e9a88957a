#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "algorithms/mergers/merger.h"

namespace moraine::algorithms::mergers {

/// Tensors of one shape that a rule joins number by number, one of each contribution, float64.
struct Values {
  std::vector<at::Tensor> tensors;
  std::vector<double> weights;
  std::vector<uint64_t> seeds;  // of random masks, one for each tensor
};
using ElementwiseRule = at::Tensor (*)(const Values& values, const MergeConfig& config);

/// kFactors: on A and on B, each by itself, as PEFT's types without a suffix: weights there are square roots of
/// |weight * scale|, with the sign on A's side. kSvd: on the changes, whose result is then cut to a rank, as PEFT's
/// "_svd". kDense: on the changes, and the result stays as it is.
enum class On { kFactors, kSvd, kDense };

/// A rule on one of the three. Factors must be of one rank.
class ElementwiseMerger final : public Merger {
 public:
  /// `traits`: density, sign and seed of the rule; the rest follows from `on`.
  ElementwiseMerger(std::string rule_name, std::string summary, ElementwiseRule rule, Traits traits, On on);
  std::string name() const override { return name_; }
  std::string summary() const override { return summary_; }
  Traits traits() const override { return traits_; }

 protected:
  Merged merge_checked(std::span<const Contribution> contributions, const MergeConfig& config,
                       const std::string& slot) const override;

 private:
  Merged merge_factors(std::span<const Contribution> contributions, const MergeConfig& config,
                       const std::string& slot) const;

  std::string name_, summary_;
  ElementwiseRule rule_;
  Traits traits_;
  On on_;
};

/// The three forms of a rule, by On.
struct ElementwiseForms {
  ElementwiseForms(const std::string& rule_name, const std::string& summary, ElementwiseRule rule, Traits traits)
      : factors(rule_name, summary, rule, traits, On::kFactors),
        svd(rule_name, summary, rule, traits, On::kSvd),
        dense(rule_name, summary, rule, traits, On::kDense) {}
  const Merger& on(On what) const { return what == On::kFactors ? factors : what == On::kSvd ? svd : dense; }

  ElementwiseMerger factors, svd, dense;
};

/// sum_i w_i t_i, in order.
at::Tensor sum_of(const Values& values);
/// The floor(density * numbers) largest by magnitude, zeros elsewhere; of equal ones the first. All for density 1.
at::Tensor pruned(const at::Tensor& values, double density);

}  // namespace moraine::algorithms::mergers
