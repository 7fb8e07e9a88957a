#pragma once

#include <optional>
#include <string>
#include <vector>

#include "algorithms/continual/training.h"

namespace moraine::algorithms::continual {

struct LinearProbeOptions {
  std::optional<TrainConfig> train = {};
};
const core::Schema<LinearProbeOptions>& linear_probe_schema();

/// Linear probe: the head alone is trained, on one task after the other, on features of the frozen backbone; logits of
/// all classes seen. Trained: head rows. A worker sends the head. Seeds: data order per task, initial head rows.
class LinearProbe final : public TrainedLearner {
 public:
  std::string name() const override { return "linear_probe"; }
  std::string title() const override { return "the head alone, frozen features"; }
  State walk_task(TaskPlan& plan, int64_t task, const State& before) const override;
  std::vector<UnitKind> unit_kinds() const override;
  TrainingOptions options(const ContinualConfig& config) const override;
  int64_t trained_parameters(const ContinualConfig&, const models::ModelFacts&) const override { return 0; }
};

}  // namespace moraine::algorithms::continual
