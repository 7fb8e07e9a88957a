#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "algorithms/continual/learner.h"

namespace moraine::algorithms::continual {

struct RanPacOptions {
  int64_t features = 1000;  // M, of the random projection
};
const core::Schema<RanPacOptions>& ranpac_schema();

/// Sums over examples in the projected space, which add exactly: gram = sum h h^T [M, M], sums[c] = sum of class c's h
/// [classes, M]; float64. Those of four fifths of every class are fitted, the others choose the ridge.
struct RanPacSums {
  std::vector<int64_t> classes;
  at::Tensor gram, sums;            // fitted
  at::Tensor held_gram, held_sums;  // held out
};

/// 10^-8, 10^-7, ..., 10^8: the one whose readout of the fitted sums has the least squared error on the held-out ones,
/// sum ||y - W h||^2 up to a constant, out of the sums alone. Of equals the largest.
double best_ridge(const RanPacSums& sums);
/// [classes, M]: the ridge readout of all sums, fitted and held out: Q (G + ridge I)^-1.
at::Tensor ridge_readout(const RanPacSums& sums, double ridge);

/// RanPAC: frozen features through a fixed random layer, h = relu(f W) with W ~ N(0, 1) [d, M], and a ridge regression
/// of one-hot labels on h. Nothing is trained: workers compute the sums of one class each, which depend on neither
/// order nor seed, so all runs of a recipe share them; the coordinator adds them; an evaluation solves. The result does
/// not depend on order and sharding but for float64 rounding. A worker sends 2 M^2 + 2 M float64 numbers per class.
/// Seeds: W by the run's. Source: RanPAC (arXiv 2307.02251), without its first phase (an adapter on the first task).
/// There the ridge is chosen task by task on the task's last fifth, here on the last fifth of every class seen
/// (inferred: both are sums); M is 10,000 there, whose sums are 0.8 GB in float64.
class RanPac final : public Learner {
 public:
  std::string name() const override { return "ranpac"; }
  std::string title() const override { return "ridge regression on random features of the frozen backbone"; }
  State walk_task(TaskPlan& plan, int64_t task, const State& before) const override;
  std::vector<UnitKind> unit_kinds() const override;
  std::string state_kind() const override { return "ranpac_sums"; }
  std::unique_ptr<Classifier> classifier(const std::vector<core::ArtefactPtr>& state, const EvaluateSpec& spec,
                                         const LearnerSite& site) const override;
  bool chained() const override { return false; }
  bool has_head() const override { return false; }
  int64_t trained_parameters(const ContinualConfig&, const models::ModelFacts&) const override { return 0; }
  int64_t numbers_per_class(const ContinualConfig& config, const models::ModelFacts& model) const override;
};

}  // namespace moraine::algorithms::continual
