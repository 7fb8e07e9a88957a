#include "algorithms/continual/joint/joint.h"

#include "algorithms/continual/config.h"
#include "core/error.h"

namespace moraine::algorithms::continual {

State Joint::walk_task(TaskPlan& plan, int64_t task, const State&) const {
  TrainWeightsSpec spec;
  plan_training(spec, plan, plan.config.train, 0, task, /*local_logits=*/false);
  UnitRequest request = training_request(task, plan.config.train, {});
  request.label = fmt::format("tasks0-{}", task);
  request.passes *= static_cast<double>(task + 1);
  const auto id = plan.need(std::move(spec), std::move(request));
  return id ? State({*id}) : std::nullopt;
}

std::unique_ptr<Classifier> Joint::classifier(const std::vector<core::ArtefactPtr>& state, const EvaluateSpec& spec,
                                              const LearnerSite& site) const {
  return fitted_classifier(state, spec, site);
}

}  // namespace moraine::algorithms::continual
