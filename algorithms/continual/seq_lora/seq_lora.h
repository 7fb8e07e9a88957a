#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "algorithms/continual/learner.h"

namespace moraine::algorithms::continual {

/// Sequential LoRA: one adapter on the frozen backbone, trained on one task after the other and never reset. Logits as
/// in Finetune: all classes seen (`seq_lora`) or the task's own (`seq_lora_local`). Trained: A, B and head rows of the
/// logits. Frozen: the backbone. A worker sends A, B and the head. Seeds: A by run and slot, data order per task,
/// initial head rows. Source: SeqLoRA in O-LoRA (arXiv 2310.14152).
class SeqLora final : public Learner {
 public:
  SeqLora(std::string name, bool local_logits) : name_(std::move(name)), local_(local_logits) {}
  std::string name() const override { return name_; }
  std::string title() const override;
  std::string kind() const override { return "train_lora"; }
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
