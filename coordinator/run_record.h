#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "coordinator/accepted_state.h"
#include "coordinator/run_directory.h"
#include "core/json.h"

namespace moraine::coordinator {

/// One accepted unit: the body of an ACCEPT record. Times are unix seconds.
struct UnitRecord {
  std::string unit, kind, label, artefact, host;
  int worker = 0;  // 0 = the coordinator
  int attempt = 1;
  int epoch = 1;  // which start of the run it was finished in; follows from the record's place
  double started = 0, ended = 0;
  double seconds = 0;  // as the worker measured it, resumed parts excluded
  core::Json stats;
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(UnitRecord, unit, kind, label, artefact, host, worker, attempt, started, ended,
                                   seconds, stats)

/// One failed attempt: the body of a FAIL record.
struct FailureRecord {
  std::string unit, kind, label, host;  // kind: of the unit; "" in journals of older versions
  std::string problem, text;            // problem: Problem::kind, the record's key "kind"
  int worker = 0;
  int attempt = 1;
  int epoch = 1;
  double started = 0, time = 0;  // time: of the failure; also `started` where an older version did not record that
};
void to_json(core::Json& json, const FailureRecord& record);
void from_json(const core::Json& json, FailureRecord& record);

struct EpochRecord {
  std::string version;
  int processes = 1;
  double time = 0;
};

/// How a start ended: what a STOP (with its reason) and a DONE record have in common.
struct EpochEnd {
  double time = 0;
  double coordinating_s = 0;  // processor time of the coordinator beside its own units: planning, storing, talking
  double planning_s = 0;      // its part that went into plans
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(EpochEnd, time, coordinating_s, planning_s)

/// A run directory as reports see it.
struct RunRecord {
  RunLayout layout;
  core::Json recipe;
  std::vector<EpochRecord> epochs;
  std::vector<UnitRecord>
      units;  // in order of acceptance; a unit that had to run again stands once, with its last record
  std::vector<FailureRecord> failures;
  bool finished = false;  // the last start came to the end of the plan
  EpochEnd ends;          // of all starts that ended, summed; their time is that of the last one
  std::shared_ptr<const AcceptedState> state;
};

/// Reads a run directory without locking it; a run may be under way. Throws UserError if it is no run directory,
/// IoError if its journal is damaged.
RunRecord read_run(const std::filesystem::path& root);

}  // namespace moraine::coordinator
