#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "algorithms/worker_context.h"

namespace moraine::worker::testing {

/// A directory of one test, empty at the start and removed at the end.
class TempDirectory {
 public:
  TempDirectory();
  ~TempDirectory();
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

/// A two-layer regression whose data are a closed formula of (step, sequence): "sequence" s of a step has 1 + s % 3
/// targets, so micro-batches differ in their number of targets. Same start values every time.
algorithms::TrainJob tiny_job(int64_t steps);

/// All parameters one after another, bit for bit.
std::vector<float> flat(const models::NamedTensors& parameters);

}  // namespace moraine::worker::testing
