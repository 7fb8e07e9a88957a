#pragma once

#include <memory>
#include <string>
#include <vector>

#include "algorithms/continual/finetune/finetune.h"
#include "algorithms/continual/learner.h"

namespace moraine::algorithms::continual {

/// Joint training, the upper bound: after task i, all weights trained from the backbone on the examples of tasks 0..i
/// at once, as many steps per task as the others take. No chain: the units of all tasks run side by side. Its first
/// task is fine-tuning's.
class Joint final : public TrainedLearner {
 public:
  std::string name() const override { return "joint"; }
  std::string title() const override { return "joint training on all seen tasks"; }
  State walk_task(TaskPlan& plan, int64_t task, const State& before) const override;
  std::vector<UnitKind> unit_kinds() const override { return {train_weights_units()}; }
  TrainingOptions options(const ContinualConfig&) const override { return {}; }
  bool chained() const override { return false; }
};

}  // namespace moraine::algorithms::continual
