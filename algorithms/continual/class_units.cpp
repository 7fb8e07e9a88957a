#include "algorithms/continual/class_units.h"

#include <algorithm>
#include <span>

#include "algorithms/continual/config.h"
#include "algorithms/continual/draw.h"
#include "core/error.h"

namespace moraine::algorithms::continual {

void plan_class(ClassSpec& spec, const TaskPlan& plan, int64_t label) {
  spec.label = label;
  spec.examples_seed = static_cast<uint64_t>(plan.config.seed);
  spec.leave_out = plan.config.stream.leave_out;
  spec.train_per_class = plan.config.stream.train_per_class;
  spec.validation_per_class = plan.config.stream.validation_per_class;
}

UnitRequest class_request(const TaskPlan& plan, int64_t task, int64_t label) {
  const auto& own = plan.stream.tasks[static_cast<size_t>(task)];
  return {.label = fmt::format("class{}", label),
          .passes = static_cast<double>(own.train) / static_cast<double>(own.classes.size()),
          .of_run = false};
}

std::vector<int64_t> class_rows(const ClassSpec& spec, const LearnerSite& site) {
  data::TaskStreamSpec draw;
  draw.train_per_class = spec.train_per_class;
  draw.validation_per_class = spec.validation_per_class;
  draw.leave_out = spec.leave_out;
  draw.seed = spec.examples_seed;
  draw.evaluate_validation = true;  // nothing is asked of test examples here
  const data::LabelledSet& set = site.examples->set();
  const auto make = [&]() -> std::shared_ptr<void> {
    return std::make_shared<data::TaskStream>(data::TaskStream::make(set, draw));
  };
  const auto stream = std::static_pointer_cast<const data::TaskStream>(
      site.context.cached(fmt::format("stream/{}/{}", core::Json(draw).dump(), set.fingerprint), make));
  std::vector<int64_t> rows;
  for (const auto& task : stream->tasks)
    for (const int64_t row : task.train)
      if (set.train[static_cast<size_t>(row)] == spec.label) rows.push_back(row);
  MORAINE_CHECK(!rows.empty(), "class {} is in no task", spec.label);
  return rows;
}

void each_feature_batch(const std::vector<int64_t>& rows, const LearnerSite& site,
                        const std::function<void(const at::Tensor& features)>& each) {
  constexpr size_t kBatch = 100;
  const auto model = site.base->shared_on(site.context.device());
  for (size_t first = 0; first < rows.size(); first += kBatch) {
    const auto part = std::span(rows).subspan(first, std::min(kBatch, rows.size() - first));
    each(model->features(site.examples->batch("train", part)).to(at::kDouble));
    site.context.progress(static_cast<double>(first + part.size()), static_cast<double>(rows.size()));
  }
}

}  // namespace moraine::algorithms::continual
