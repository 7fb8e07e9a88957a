#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "algorithms/continual/learner.h"
#include "algorithms/continual/training.h"

namespace moraine::algorithms::continual {

/// All weights and the head on some tasks.
struct TrainWeightsSpec : TrainSpec {
  static constexpr const char* kKind = "train_weights";
  static constexpr int64_t kVersion = 1;
  static const core::Schema<TrainWeightsSpec>& schema() { return plain_train_schema<TrainWeightsSpec>(); }
};
UnitKind train_weights_units();

/// Sequential fine-tuning: every weight and the head are trained on one task after the other, with nothing that holds
/// on to old tasks. Logits over all classes seen so far (`finetune`, which pushes old classes down), or over the task's
/// own with the rows of old classes left alone (`finetune_local`: what prompt and adapter methods compare with).
/// Trained: all weights, head rows of the logits. A worker sends them all. Seeds: data order per task, initial head
/// rows. Source: PILOT's finetune; the local variant as L2P, MOS and EASE train.
class Finetune final : public TrainedLearner {
 public:
  Finetune(std::string name, bool local_logits) : name_(std::move(name)), local_(local_logits) {}
  std::string name() const override { return name_; }
  std::string title() const override;
  State walk_task(TaskPlan& plan, int64_t task, const State& before) const override;
  std::vector<UnitKind> unit_kinds() const override { return {train_weights_units()}; }
  TrainingOptions options(const ContinualConfig&) const override { return {}; }

 private:
  std::string name_;
  bool local_;
};

}  // namespace moraine::algorithms::continual
