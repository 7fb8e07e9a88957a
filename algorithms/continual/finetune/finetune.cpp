#include "algorithms/continual/finetune/finetune.h"

#include "algorithms/continual/config.h"
#include "core/error.h"

namespace moraine::algorithms::continual {
namespace {

core::ArtefactPtr train_weights(const Unit& unit, const LearnerSite& site) {
  const auto spec = core::from_spec(TrainWeightsSpec::schema(), unit.spec);
  Trainee trainee = Trainee::of(unit, spec, site);
  return train_tasks(unit.kind, spec, trainee, site, site.config.train);
}

}  // namespace

UnitKind train_weights_units() { return {TrainWeightsSpec::kKind, train_weights, problem_of_trained}; }

std::string Finetune::title() const {
  return local_ ? "fine-tuning, logits of the task" : "fine-tuning, logits of all seen";
}

State Finetune::walk_task(TaskPlan& plan, int64_t task, const State& before) const {
  return after_training<TrainWeightsSpec>(plan, task, before, {}, local_);
}

}  // namespace moraine::algorithms::continual
