#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "coordinator/accepted_state.h"
#include "coordinator/run_directory.h"
#include "core/json.h"

namespace moraine::coordinator {

/// One accepted unit. Times are unix seconds.
struct UnitRecord {
  std::string unit, kind, label, artefact, host;
  int worker = 0;  // 0 = the coordinator
  int attempt = 1;
  int epoch = 1;  // which start of the run it was finished in
  double started = 0, ended = 0;
  double seconds = 0;  // as the worker measured it, resumed parts excluded
  core::Json stats;
};

struct FailureRecord {
  std::string unit, label, host, kind, text;
  int worker = 0;
  int attempt = 1;
  int epoch = 1;
  double time = 0;
};

struct EpochRecord {
  std::string version;
  int processes = 1;
  double time = 0;
};

/// A run directory as reports see it.
struct RunRecord {
  RunLayout layout;
  core::Json recipe;
  std::vector<EpochRecord> epochs;
  std::vector<UnitRecord>
      units;  // in order of acceptance; a unit that had to run again stands once, with its last record
  std::vector<FailureRecord> failures;
  bool finished = false;  // the last start came to the end of the plan
  std::shared_ptr<const AcceptedState> state;
};

/// Reads a run directory without locking it; a run may be under way. Throws UserError if it is no run directory,
/// IoError if its journal is damaged.
RunRecord read_run(const std::filesystem::path& root);

}  // namespace moraine::coordinator
