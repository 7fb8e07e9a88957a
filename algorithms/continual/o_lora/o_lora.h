#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "algorithms/continual/training.h"

namespace moraine::algorithms::continual {

struct OLoraOptions {
  adapters::AdapterConfig adapter = {};
  std::optional<TrainConfig> train = {};
  double strength = 0.5;  // of the penalty on overlap
};
const core::Schema<OLoraOptions>& o_lora_schema();

/// sum over pairs of sum |A_old A_new^T|: how much of the subspaces that old factors A [r, in] read is read again. Old
/// and new name the same tensors in the same order. Differentiable in `fresh`.
at::Tensor overlap(const models::NamedTensors& old, const models::NamedTensors& fresh);

/// O-LoRA: one LoRA per task, all of them added to the backbone; a task's own is kept apart from those before it by
/// loss = CE + strength sum_{i < t} sum |A_i A_t^T|, over modules. Logits of all classes seen. Trained: the task's A
/// and B and head rows. Frozen: the backbone and all LoRAs before. A worker sends the task's LoRA and the head. Seeds:
/// A by run, task and slot, data order per task, initial head rows. Source: O-LoRA (arXiv 2310.14152), equation 8, as
/// its code has it (absolute values; lambda_1 0.5, no second penalty); there a language model, here a head.
class OLora final : public TrainedLearner {
 public:
  std::string name() const override { return "o_lora"; }
  std::string title() const override { return "one LoRA per task in directions of its own"; }
  State walk_task(TaskPlan& plan, int64_t task, const State& before) const override;
  std::vector<UnitKind> unit_kinds() const override;
  std::unique_ptr<Classifier> classifier(const std::vector<core::ArtefactPtr>& state, const EvaluateSpec& spec,
                                         const LearnerSite& site) const override;
  Exportable exportable(const std::vector<core::ArtefactPtr>& state, const EvaluateSpec& spec,
                        const LearnerSite& site) const override;
  TrainingOptions options(const ContinualConfig& config) const override;
  void check(const ContinualConfig& config, const models::ModelFacts& model) const override;
};

}  // namespace moraine::algorithms::continual
