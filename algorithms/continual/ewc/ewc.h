#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "algorithms/continual/training.h"

namespace moraine::algorithms::continual {

struct EwcOptions : TrainingOptions {
  double strength = 1000;  // of the penalty
  double decay = 1;        // of the importance of tasks before, at every task
  int64_t samples = 200;   // examples of a task that its importance is measured on
};
const core::Schema<EwcOptions>& ewc_schema();

/// sum over parameters of sum importance (value - anchor)^2. The three lists name the same tensors in the same order.
/// Differentiable in `values`.
at::Tensor ewc_penalty(const models::NamedTensors& values, const models::NamedTensors& anchors,
                       const models::NamedTensors& importance);

/// Elastic weight consolidation: a task's training is pulled back to the model before it, each number as strongly as it
/// mattered: loss = CE + strength sum_k F_k (theta_k - theta*_k)^2. After every task one more unit measures
/// F = decay F_before + (1/N) sum_n (d log p(y_n | x_n) / d theta)^2, the diagonal of the empirical Fisher information,
/// example by example, over trained tensors and head rows. No example is kept. Trained: an adapter or all weights, and
/// head rows. A worker sends what it trained, and as many numbers of importance. Seeds: as fine-tuning, and which
/// examples are measured. Source: EWC (arXiv 1612.00796) with one running penalty (online EWC, arXiv 1805.06370),
/// as in Mammoth; no factor 1/2.
class Ewc final : public TrainedLearner {
 public:
  std::string name() const override { return "ewc"; }
  std::string title() const override { return "pulled back to the model before, by importance"; }
  State walk_task(TaskPlan& plan, int64_t task, const State& before) const override;
  std::vector<UnitKind> unit_kinds() const override;
  size_t parts_scored(size_t parts) const override { return parts < 1 ? parts : 1; }  // not the importance
  int64_t numbers_sent(const ContinualConfig& config, const models::ModelFacts& model) const override {
    return 2 * trained_parameters(config, model);
  }
  int64_t numbers_per_class(const ContinualConfig&, const models::ModelFacts& model) const override {
    return 2 * (model.width + 1);
  }
  TrainingOptions options(const ContinualConfig& config) const override;
};

}  // namespace moraine::algorithms::continual
