#pragma once

#include <memory>
#include <string>
#include <vector>

#include "algorithms/continual/learner.h"

namespace moraine::algorithms::continual {

/// SimpleCIL: no training. A class's prototype is the mean feature of its training examples on the frozen backbone; an
/// example belongs to the prototype of the largest cosine. One unit per class, which depends on neither order nor seed,
/// so all runs of a recipe share them; exact under any sharding of classes. A worker sends d numbers per class.
/// Source: SimpleCIL in APER (arXiv 2303.07338).
class SimpleCil final : public Learner {
 public:
  std::string name() const override { return "simplecil"; }
  std::string title() const override { return "class means on the frozen backbone"; }
  State walk_task(TaskPlan& plan, int64_t task, const State& before) const override;
  std::vector<UnitKind> unit_kinds() const override;
  std::string state_kind() const override { return "prototype"; }
  std::unique_ptr<Classifier> classifier(const std::vector<core::ArtefactPtr>& state, const EvaluateSpec& spec,
                                         const LearnerSite& site) const override;
  bool chained() const override { return false; }
  bool has_head() const override { return false; }
  int64_t trained_parameters(const ContinualConfig&, const models::ModelFacts&) const override { return 0; }
  int64_t numbers_per_class(const ContinualConfig&, const models::ModelFacts& model) const override {
    return model.width;
  }
};

}  // namespace moraine::algorithms::continual
