#include "algorithms/continual/joint/joint.h"

#include "algorithms/continual/config.h"
#include "algorithms/continual/finetune/finetune.h"
#include "algorithms/continual/head.h"

namespace moraine::algorithms::continual {
namespace {

// What is trained and what a state predicts is fine-tuning's; the plan differs.
const Finetune kWeights("joint", false);

}  // namespace

std::vector<UnitRequest> Joint::units(const ContinualConfig& config, const StreamFacts& stream, int64_t task,
                                      int64_t seed, const std::vector<std::string>&) const {
  return {{fmt::format("tasks0-{}", task),
           training_spec(config.train, stream, 0, task, false, seed),
           {},
           trained_images(config.train) * static_cast<double>(task + 1)}};
}

core::ArtefactPtr Joint::execute(const Unit& unit, const LearnerSite& site) const {
  return kWeights.execute(unit, site);
}

std::unique_ptr<Classifier> Joint::classifier(const std::vector<core::ArtefactPtr>& state, uint64_t seed,
                                              const LearnerSite& site) const {
  return kWeights.classifier(state, seed, site);
}

int64_t Joint::trained_parameters(const ContinualConfig& config, const models::Vit& base) const {
  return kWeights.trained_parameters(config, base);
}

}  // namespace moraine::algorithms::continual
