#include "algorithms/continual/joint/joint.h"

#include "algorithms/continual/config.h"
#include "core/error.h"

namespace moraine::algorithms::continual {

State Joint::walk_task(TaskPlan& plan, int64_t task, const State&) const {
  TrainWeightsSpec spec;
  plan_training(spec, plan, plan.config.train, 0, task, /*local_logits=*/false);
  UnitRequest unit = request(plan, task, {});
  unit.label = fmt::format("tasks0-{}", task);
  unit.passes *= static_cast<double>(task + 1);
  const auto id = plan.need(std::move(spec), std::move(unit));
  return id ? State({*id}) : std::nullopt;
}

}  // namespace moraine::algorithms::continual
