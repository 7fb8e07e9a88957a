#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "core/config.h"

namespace moraine::algorithms {

/// Who does the work. None of it changes results but `threads`, `group_size`, `device` and `arithmetic`:
/// compute_identity().
struct WorkersConfig {
  int64_t threads = 1;  // CPU threads of one process; results are bit-equal only for equal thread counts
  int64_t local = 0;    // working threads when not started by mpirun; 0 = as many whole groups as fit cores / threads
  int64_t group_size = 1;      // processes (or local threads) that train one unit together
  int64_t bucket_mib = 8;      // gradients travel in pieces of about this size within a group; 0 = each tensor alone
  bool overlap = true;         // and start to travel while backward still runs
  std::string device = "cpu";  // cpu | cuda
  // portable, or the name of native arithmetic (algorithms/arithmetic.h); bare "native" in runs recorded before there
  // was a choice, whose processor is unknown
  std::string arithmetic = "native";
  int64_t retries = 3;  // attempts per unit before the run gives up
};

/// What every recipe has, whatever its method.
struct RunConfig {
  std::string name;
  std::string method;
  std::string run_dir;  // "" = runs/<name> under the working directory
  int64_t seed = 1;
  WorkersConfig workers;
};

const core::Schema<WorkersConfig>& workers_schema();

/// What of it belongs into every unit's spec because bits depend on it: threads, device, arithmetic (where it is known)
/// and, above 1, group_size.
core::Json compute_identity(const WorkersConfig& workers);

/// How many workers `processes` working processes are. Throws UserError if group_size does not divide them.
int num_workers(const WorkersConfig& workers, int64_t processes);

/// The problem with a run's name as text, nullopt when it can name a directory below runs/.
std::optional<std::string> run_name_problem(const std::string& name);

/// Adds the RunConfig fields to the table of a method's own configuration, which derives from RunConfig.
template <typename C>
void add_run_fields(core::Schema<C>& schema) {
  schema.template field<std::string>("name", &C::name)
      .changes_nothing()
      .required()
      .doc("Name of the run; its directory is runs/<name>")
      .template field<std::string>("method", &C::method)
      .required()
      .doc("What to run; `moraine run --help` lists the methods")
      .template field<std::string>("run_dir", &C::run_dir)
      .path()
      .doc("Run directory; empty = runs/<name> under the working directory")
      .template field<int64_t>("seed", &C::seed)
      .min(0)
      .doc("Seed of everything random in the run")
      .template object<WorkersConfig>("workers", &C::workers, workers_schema())
      .doc("Who does the work")
      .check([](const C& config) { return run_name_problem(config.name); });
}

}  // namespace moraine::algorithms
