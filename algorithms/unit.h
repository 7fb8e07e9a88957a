#pragma once

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "core/artefact.h"
#include "core/json.h"

namespace moraine::algorithms {

/// Where a unit runs. Merges and other light work on artefacts run on the coordinator, which has them all.
enum class Place { kWorker, kCoordinator };

/// The smallest thing leased to a worker. Its id is the hash of what determines its result, so a unit whose artefact
/// exists is done: resume, re-runs after an edit and sweeps all reuse it.
struct Unit {
  std::string kind;                 // "train_expert", "evaluate", ...: how Method::execute tells units apart
  std::string label;                // for people: "train/german"; not hashed
  core::Json spec;                  // everything that determines the result, data fingerprints and seeds included
  std::vector<std::string> inputs;  // artefact ids, in an order the kind defines
  Place place = Place::kWorker;     // not hashed
  double cost = 1;                  // predicted work in FLOPs; not hashed
  double follows = 0;  // cost of the longest chain of units that wait for this one, at its kind's speed; not hashed

  /// SHA-256 of the canonical JSON of {kind, spec, inputs}.
  std::string id() const;
  core::Json to_json() const;
  static Unit from_json(const core::Json& json);
};

/// Finished units by label, from plan to plan of one run: what is finished stays so, and its spec need not be made and
/// hashed again. Not thread-safe.
struct PlanMemory {
  struct Finished {
    std::string artefact, kind;
    double cost = 0;
    uint64_t plan = 0;  // which asked for it last
  };
  std::unordered_map<std::string, Finished> units;
  uint64_t plans = 0;
};

/// What has been accepted so far, as plan() sees it.
class RunState {
 public:
  virtual ~RunState() = default;
  /// Artefact id of a finished unit, nullopt when it is not finished.
  virtual std::optional<std::string> result(const std::string& unit_id) const = 0;
  /// An accepted artefact. Throws InternalError if the id was never accepted.
  virtual core::ArtefactPtr artefact(const std::string& id) const = 0;
  /// Whether finished units of a plan keep `spec` and `inputs`. A coordinator needs their ids alone, and thousands of
  /// specs are most of a plan's memory.
  virtual bool keeps_finished_specs() const { return true; }
  /// Of who plans one run again and again; nullptr = every plan stands for itself.
  virtual PlanMemory* memory() const { return nullptr; }
};

/// What to do next. `pending` are the units that can run now; the run is over when there are none.
struct Plan {
  std::vector<Unit> pending;
  std::vector<Unit> finished;  // needed and already done, in planning order; RunState::keeps_finished_specs(). Without
                               // those that RunState::memory() knows
  std::vector<std::string> pending_ids = {}, finished_ids = {};  // parallel to them
  std::map<std::string, double> finished_cost = {};              // of all finished units, by kind
};

/// Collects a plan while plan() walks through its procedure: need() returns the artefact id of a finished unit, or
/// notes the unit as pending and returns nullopt. Asking twice for one unit notes it once.
class PlanBuilder {
 public:
  explicit PlanBuilder(const RunState& state);
  std::optional<std::string> need(Unit unit);
  /// The same for walks over thousands of units: `make` gives the unit of that label, and is not called when an earlier
  /// plan found it finished. One label names one unit throughout a run; InternalError if a plan uses it for two.
  std::optional<std::string> need(const std::string& label, const std::function<Unit()>& make);
  const RunState& state() const { return state_; }
  Plan finish();

 private:
  std::optional<std::string> need(Unit unit, std::string id);

  const RunState& state_;
  PlanMemory* memory_;
  Plan plan_;
  std::unordered_set<std::string> seen_;
  std::unordered_map<std::string, std::string> labels_;              // of the second need(), to unit ids
  std::vector<std::pair<std::string, PlanMemory::Finished>> found_;  // finished, and new to the memory
};

}  // namespace moraine::algorithms
