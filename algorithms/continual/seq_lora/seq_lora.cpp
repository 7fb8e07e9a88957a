#include "algorithms/continual/seq_lora/seq_lora.h"

#include "algorithms/continual/config.h"

namespace moraine::algorithms::continual {
namespace {

const TrainConfig& training(const ContinualConfig& config) {
  const auto& own = config.learners.seq_lora;
  return own && own->train ? *own->train : config.train;
}

adapters::AdapterConfig adapter(const ContinualConfig& config) {
  return config.learners.seq_lora.value_or(SeqLoraOptions{}).adapter;
}

core::ArtefactPtr train_lora(const Unit& unit, const LearnerSite& site) {
  const auto spec = core::from_spec(TrainLoraSpec::schema(), unit.spec);
  const auto before = spec.fresh ? nullptr : site.context.artefact(unit.inputs.at(0));
  Trainee trainee = Trainee::make(spec, before, /*head_only=*/false, site);
  return train_tasks(unit.kind, spec, trainee, site, training(site.config));
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
  if (!before) return std::nullopt;
  TrainLoraSpec spec;
  plan_training(spec, plan, training(plan.config), task, task, local_);
  plan_adapter(spec, plan, adapter(plan.config));
  spec.fresh = before->empty();
  const auto id = plan.need(std::move(spec), training_request(task, training(plan.config), *before));
  return id ? State({*id}) : std::nullopt;
}

std::vector<UnitKind> SeqLora::unit_kinds() const { return {{TrainLoraSpec::kKind, train_lora, problem_of_trained}}; }

void SeqLora::describe(const ContinualConfig& config, int64_t seed, EvaluateSpec& spec) const {
  describe_adapter(adapter(config), seed, spec);
}

std::unique_ptr<Classifier> SeqLora::classifier(const std::vector<core::ArtefactPtr>& state, const EvaluateSpec& spec,
                                                const LearnerSite& site) const {
  return fitted_classifier(state, spec, site);
}

int64_t SeqLora::trained_parameters(const ContinualConfig& config, const models::ModelFacts& model) const {
  return trained_numbers(adapter(config), model);
}

void SeqLora::check(const ContinualConfig& config, const models::ModelFacts& model) const {
  check_adapter(adapter(config), model, "learners.seq_lora.adapter");
}

}  // namespace moraine::algorithms::continual
