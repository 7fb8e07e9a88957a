#pragma once

#include <memory>
#include <string>
#include <vector>

#include "algorithms/continual/learner.h"

namespace moraine::algorithms::continual {

/// Sequential fine-tuning: every weight and the head are trained on one task after the other, with nothing that holds
/// on to old tasks. Logits over all classes seen so far (`finetune`, which pushes old classes down), or over the task's
/// own with the rows of old classes left alone (`finetune_local`: what prompt and adapter methods compare with).
/// Trained: all weights, head rows of the logits. A worker sends them all. Seeds: data order per task, initial head
/// rows. Source: PILOT's finetune; the local variant as L2P, MOS and EASE train.
class Finetune final : public Learner {
 public:
  Finetune(std::string name, bool local_logits) : name_(std::move(name)), local_(local_logits) {}
  std::string name() const override { return name_; }
  std::string title() const override;
  std::string kind() const override { return "train_weights"; }
  bool chained() const override { return true; }
  std::vector<UnitRequest> units(const ContinualConfig& config, const StreamFacts& stream, int64_t task, int64_t seed,
                                 const std::vector<std::string>& before) const override;
  core::ArtefactPtr execute(const Unit& unit, const LearnerSite& site) const override;
  std::unique_ptr<Classifier> classifier(const std::vector<core::ArtefactPtr>& state, uint64_t head_seed,
                                         const LearnerSite& site) const override;
  int64_t trained_parameters(const ContinualConfig& config, const models::Vit& base) const override;

 private:
  std::string name_;
  bool local_;
};

}  // namespace moraine::algorithms::continual
