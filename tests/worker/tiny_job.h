#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "algorithms/worker_context.h"
#include "tests/temporary_directory.h"

namespace moraine::worker::testing {

using TempDirectory = TemporaryDirectory;

/// A two-layer regression whose data are a closed formula of (step, sequence): "sequence" s of a step has 1 + s % 3
/// targets, so micro-batches differ in their number of targets. Same start values every time.
algorithms::TrainJob tiny_job(int64_t steps);

/// All parameters one after another, bit for bit.
std::vector<float> flat(const models::NamedTensors& parameters);

}  // namespace moraine::worker::testing
