#pragma once

#include "core/json.h"
#include "data/task_stream.h"

// How a stream is drawn from its images, as units name it: what a worker draws does not depend on its own recipe.
namespace moraine::data {

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(TaskStreamSpec, tasks, base_classes, increment, leave_out, train_per_class,
                                   test_per_class, validation_per_class, evaluate_validation, seed, order)

}  // namespace moraine::data
