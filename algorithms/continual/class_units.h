#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "algorithms/continual/learner.h"

namespace moraine::algorithms::continual {

/// What every unit says that reads the frozen features of one class's training examples. They are the same in every
/// order and for every seed, so all runs of a recipe share such units.
struct ClassSpec : SiteSpec {
  int64_t label = 0;
  uint64_t examples_seed = 0;  // which examples, where there is a limit
  std::vector<int64_t> leave_out = {};
  int64_t train_per_class = 0, validation_per_class = 0;
  bool fresh = true;  // starts from no state; stands here since units were first recorded
};
template <typename C>
void add_class_fields(core::Schema<C>& schema) {
  add_site_fields(schema);
  schema.template field<int64_t>("class", &C::label)
      .template field<uint64_t>("images_seed", &C::examples_seed)
      .template field<std::vector<int64_t>>("leave_out", &C::leave_out)
      .template field<int64_t>("train_per_class", &C::train_per_class)
      .template field<int64_t>("validation_per_class", &C::validation_per_class)
      .template field<bool>("fresh", &C::fresh);
}

/// Fills what `spec` says of one class.
void plan_class(ClassSpec& spec, const TaskPlan& plan, int64_t label);
/// "class3", shared by all runs.
UnitRequest class_request(const TaskPlan& plan, int64_t task, int64_t label);

/// The class's training rows, ascending.
std::vector<int64_t> class_rows(const ClassSpec& spec, const LearnerSite& site);
/// Features of the frozen backbone in float64, [rows, d], batch by batch of a fixed size, because a feature's last bits
/// depend on it.
void each_feature_batch(const std::vector<int64_t>& rows, const LearnerSite& site,
                        const std::function<void(const at::Tensor& features)>& each);

}  // namespace moraine::algorithms::continual
