#include "algorithms/continual/linear_probe/linear_probe.h"

#include "algorithms/continual/config.h"

namespace moraine::algorithms::continual {
namespace {

/// The head on one task.
struct TrainHeadSpec : TrainSpec {
  static constexpr const char* kKind = "train_head";
  static constexpr int64_t kVersion = 1;
  static const core::Schema<TrainHeadSpec>& schema() { return plain_train_schema<TrainHeadSpec>(); }
};

core::ArtefactPtr train_head(const Unit& unit, const LearnerSite& site) {
  const auto spec = core::from_spec(TrainHeadSpec::schema(), unit.spec);
  Trainee trainee = Trainee::of(unit, spec, site, /*head_only=*/true);
  return train_tasks(unit.kind, spec, trainee, site, training_in(site.config.learners.linear_probe, site.config.train));
}

}  // namespace

const core::Schema<LinearProbeOptions>& linear_probe_schema() {
  static const auto schema = core::Schema<LinearProbeOptions>()
                                 .optional_object("train", &LinearProbeOptions::train, train_schema())
                                 .doc("Training on one task; absent = the recipe's train");
  return schema;
}

State LinearProbe::walk_task(TaskPlan& plan, int64_t task, const State& before) const {
  return after_training<TrainHeadSpec>(plan, task, before, {}, /*local_logits=*/false, 1.0 / 3);  // forward alone
}

std::vector<UnitKind> LinearProbe::unit_kinds() const {
  return {{TrainHeadSpec::kKind, train_head, problem_of_trained}};
}

TrainingOptions LinearProbe::options(const ContinualConfig& config) const {
  return {std::nullopt, config.learners.linear_probe.value_or(LinearProbeOptions{}).train};
}

}  // namespace moraine::algorithms::continual
