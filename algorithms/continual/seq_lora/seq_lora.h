#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "algorithms/continual/learner.h"
#include "algorithms/continual/training.h"

namespace moraine::algorithms::continual {

struct SeqLoraOptions {
  adapters::AdapterConfig adapter = {};
  std::optional<TrainConfig> train = {};
};
const core::Schema<SeqLoraOptions>& seq_lora_schema();

/// An adapter and the head on one task.
struct TrainLoraSpec : TrainSpec {
  static constexpr const char* kKind = "train_lora";
  static constexpr int64_t kVersion = 1;
  static const core::Schema<TrainLoraSpec>& schema() { return plain_train_schema<TrainLoraSpec>(); }
};

/// Sequential LoRA: one adapter of any type on the frozen backbone, trained on one task after the other and never
/// reset. Logits as in Finetune: all classes seen (`seq_lora`) or the task's own (`seq_lora_local`); both have the
/// options of `learners.seq_lora`. Trained: the adapter and head rows of the logits. Frozen: the backbone. A worker
/// sends the adapter and the head. Seeds: the adapter's by run and slot, data order per task, initial head rows.
/// Source: SeqLoRA in O-LoRA (arXiv 2310.14152).
class SeqLora final : public TrainedLearner {
 public:
  SeqLora(std::string name, bool local_logits) : name_(std::move(name)), local_(local_logits) {}
  std::string name() const override { return name_; }
  std::string title() const override;
  State walk_task(TaskPlan& plan, int64_t task, const State& before) const override;
  std::vector<UnitKind> unit_kinds() const override;
  TrainingOptions options(const ContinualConfig& config) const override;

 private:
  std::string name_;
  bool local_;
};

}  // namespace moraine::algorithms::continual
