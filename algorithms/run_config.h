#pragma once

#include <cstdint>
#include <string>

#include "core/config.h"

namespace moraine::algorithms {

/// Who does the work. None of it changes results but `threads`, which is therefore part of every unit's identity.
struct WorkersConfig {
  int64_t threads = 1;          // CPU threads of one worker; results are bit-equal only for equal thread counts
  int64_t local = 0;            // workers when not started by mpirun; 0 = cores / threads
  std::string device = "cpu";   // cpu | cuda
  int64_t retries = 3;          // attempts per unit before the run gives up
};

/// What every recipe has, whatever its method.
struct RunConfig {
  std::string name;
  std::string method;
  std::string run_dir;          // "" = runs/<name> under the working directory
  int64_t seed = 1;
  WorkersConfig workers;
};

const core::Schema<WorkersConfig>& workers_schema();

/// Adds the RunConfig fields to the table of a method's own configuration, which derives from RunConfig.
template <typename C>
void add_run_fields(core::Schema<C>& schema) {
  schema.template field<std::string>("name", &C::name).required().doc("Name of the run; its directory is runs/<name>")
      .template field<std::string>("method", &C::method).required().doc("What to run; `moraine run --help` lists the methods")
      .template field<std::string>("run_dir", &C::run_dir).path().doc("Run directory; empty = runs/<name> under the working directory")
      .template field<int64_t>("seed", &C::seed).min(0).doc("Seed of everything random in the run")
      .template object<WorkersConfig>("workers", &C::workers, workers_schema()).doc("Who does the work");
}

}  // namespace moraine::algorithms
