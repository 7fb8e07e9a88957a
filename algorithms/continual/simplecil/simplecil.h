#pragma once

#include <memory>
#include <string>
#include <vector>

#include "algorithms/continual/learner.h"

namespace moraine::algorithms::continual {

/// SimpleCIL: no training. A class's prototype is the mean CLS feature of its training images on the frozen backbone;
/// an image belongs to the prototype of the largest cosine. One unit per class, which depends on neither order nor
/// seed, so all runs of a recipe share them; exact under any sharding of classes. A worker sends d numbers per class.
/// Source: SimpleCIL in APER (arXiv 2303.07338).
class SimpleCil final : public Learner {
 public:
  std::string name() const override { return "simplecil"; }
  std::string title() const override { return "class means on the frozen backbone"; }
  std::string kind() const override { return "prototype"; }
  bool chained() const override { return false; }
  bool accumulates() const override { return true; }
  std::vector<UnitRequest> units(const ContinualConfig& config, const StreamFacts& stream, int64_t task, int64_t seed,
                                 const std::vector<std::string>& before) const override;
  core::ArtefactPtr execute(const Unit& unit, const LearnerSite& site) const override;
  std::unique_ptr<Classifier> classifier(const std::vector<core::ArtefactPtr>& state, uint64_t head_seed,
                                         const LearnerSite& site) const override;
  int64_t trained_parameters(const ContinualConfig&, const models::Vit&) const override { return 0; }
};

}  // namespace moraine::algorithms::continual
