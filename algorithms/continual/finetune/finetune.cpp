#include "algorithms/continual/finetune/finetune.h"

#include "algorithms/continual/config.h"
#include "core/error.h"

namespace moraine::algorithms::continual {
namespace {

core::ArtefactPtr train_weights(const Unit& unit, const LearnerSite& site) {
  const auto spec = core::from_spec(TrainWeightsSpec::schema(), unit.spec);
  const auto before = spec.fresh ? nullptr : site.context.artefact(unit.inputs.at(0));
  Trainee trainee = Trainee::make(spec, before, /*head_only=*/false, site);
  return train_tasks(unit.kind, spec, trainee, site, site.config.train);
}

}  // namespace

UnitKind train_weights_units() { return {TrainWeightsSpec::kKind, train_weights, problem_of_trained}; }

std::string Finetune::title() const {
  return local_ ? "fine-tuning, logits of the task" : "fine-tuning, logits of all seen";
}

State Finetune::walk_task(TaskPlan& plan, int64_t task, const State& before) const {
  if (!before) return std::nullopt;
  TrainWeightsSpec spec;
  plan_training(spec, plan, plan.config.train, task, task, local_);
  spec.fresh = before->empty();
  const auto id = plan.need(std::move(spec), training_request(task, plan.config.train, *before));
  return id ? State({*id}) : std::nullopt;
}

std::unique_ptr<Classifier> Finetune::classifier(const std::vector<core::ArtefactPtr>& state, const EvaluateSpec& spec,
                                                 const LearnerSite& site) const {
  return fitted_classifier(state, spec, site);
}

}  // namespace moraine::algorithms::continual
