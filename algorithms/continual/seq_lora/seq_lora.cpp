#include "algorithms/continual/seq_lora/seq_lora.h"

#include "algorithms/continual/config.h"

namespace moraine::algorithms::continual {
namespace {

core::ArtefactPtr train_lora(const Unit& unit, const LearnerSite& site) {
  const auto spec = core::from_spec(TrainLoraSpec::schema(), unit.spec);
  Trainee trainee = Trainee::of(unit, spec, site);
  return train_tasks(unit.kind, spec, trainee, site, training_in(site.config.learners.seq_lora, site.config.train));
}

}  // namespace

const core::Schema<SeqLoraOptions>& seq_lora_schema() {
  using C = SeqLoraOptions;
  static const auto schema = core::Schema<C>()
                                 .object("adapter", &C::adapter, adapters::adapter_schema())
                                 .doc("The adapter")
                                 .optional_object("train", &C::train, train_schema())
                                 .doc("Training on one task; absent = the recipe's train");
  return schema;
}

std::string SeqLora::title() const { return local_ ? "one LoRA, logits of the task" : "one LoRA, logits of all seen"; }

State SeqLora::walk_task(TaskPlan& plan, int64_t task, const State& before) const {
  return after_training<TrainLoraSpec>(plan, task, before, {}, local_);
}

std::vector<UnitKind> SeqLora::unit_kinds() const { return {{TrainLoraSpec::kKind, train_lora, problem_of_trained}}; }

TrainingOptions SeqLora::options(const ContinualConfig& config) const {
  const SeqLoraOptions own = config.learners.seq_lora.value_or(SeqLoraOptions{});
  return {own.adapter, own.train};
}

}  // namespace moraine::algorithms::continual
