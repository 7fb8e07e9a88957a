#pragma once

#include <memory>
#include <string>
#include <vector>

#include "algorithms/continual/learner.h"

namespace moraine::algorithms::continual {

/// Joint training, the upper bound: after task i, all weights trained from the backbone on the images of tasks 0..i at
/// once, as many steps per task as the others take. No chain: the units of all tasks run side by side. Its first task
/// is fine-tuning's.
class Joint final : public Learner {
 public:
  std::string name() const override { return "joint"; }
  std::string title() const override { return "joint training on all seen tasks"; }
  std::string kind() const override { return "train_weights"; }
  bool chained() const override { return false; }
  std::vector<UnitRequest> units(const ContinualConfig& config, const StreamFacts& stream, int64_t task, int64_t seed,
                                 const std::vector<std::string>& before) const override;
  core::ArtefactPtr execute(const Unit& unit, const LearnerSite& site) const override;
  std::unique_ptr<Classifier> classifier(const std::vector<core::ArtefactPtr>& state, uint64_t head_seed,
                                         const LearnerSite& site) const override;
  int64_t trained_parameters(const ContinualConfig& config, const models::Vit& base) const override;
};

}  // namespace moraine::algorithms::continual
