#pragma once

#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "algorithms/continual/training.h"

namespace moraine::algorithms::continual {

struct LwfOptions : TrainingOptions {
  double strength = 3;     // of the distillation against the cross entropy
  double temperature = 2;  // of both softmaxes
};
const core::Schema<LwfOptions>& lwf_schema();

/// - sum over rows and classes of softmax(old / T) log_softmax(new / T); both [B, classes]. Differentiable in `scores`.
at::Tensor distillation(const at::Tensor& scores, const at::Tensor& old_scores, double temperature);

/// Learning without Forgetting: cross entropy over all classes seen, and what the model before the task says of old
/// classes on the new task's examples is kept: loss = CE + strength * distillation / B. No example is kept. Trained: an
/// adapter or all weights, and head rows. Frozen: the model before the task, which every step passes a second time. A
/// worker sends what it trained. Seeds: as fine-tuning. Source: LwF (arXiv 1606.09282), loss as in PyCIL (no factor
/// T^2; strength 3, T 2).
class Lwf final : public TrainedLearner {
 public:
  std::string name() const override { return "lwf"; }
  std::string title() const override { return "distillation from the model before the task"; }
  State walk_task(TaskPlan& plan, int64_t task, const State& before) const override;
  std::vector<UnitKind> unit_kinds() const override;
  TrainingOptions options(const ContinualConfig& config) const override;
};

}  // namespace moraine::algorithms::continual
