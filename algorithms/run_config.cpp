#include "algorithms/run_config.h"

namespace moraine::algorithms {

const core::Schema<WorkersConfig>& workers_schema() {
  static const auto schema = [] {
    core::Schema<WorkersConfig> s;
    s.field("threads", &WorkersConfig::threads).min(1).max(1024).doc("CPU threads of one worker; part of every unit's identity, because sums depend on it")
        .field("local", &WorkersConfig::local).min(0).max(1024).doc("Workers when not started by mpirun; 0 = cores / threads")
        .field("device", &WorkersConfig::device).choices({"cpu", "cuda"}).doc("Where workers compute; never falls back")
        .field("retries", &WorkersConfig::retries).min(1).max(10).doc("Attempts per unit before the run gives up");
    return s;
  }();
  return schema;
}

}  // namespace moraine::algorithms
