#pragma once

#include <functional>
#include <optional>
#include <string>
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
};

/// What to do next. `pending` are the units that can run now; the run is over when there are none.
struct Plan {
  std::vector<Unit> pending;
  std::vector<Unit> finished;  // needed and already done, in planning order; RunState::keeps_finished_specs()
  std::vector<std::string> pending_ids = {}, finished_ids = {};  // parallel to them
};

/// Collects a plan while plan() walks through its procedure: need() returns the artefact id of a finished unit, or
/// notes the unit as pending and returns nullopt. Asking twice for one unit notes it once.
class PlanBuilder {
 public:
  explicit PlanBuilder(const RunState& state) : state_(state) {}
  std::optional<std::string> need(Unit unit);
  const RunState& state() const { return state_; }
  Plan finish() { return std::move(plan_); }

 private:
  const RunState& state_;
  Plan plan_;
  std::unordered_set<std::string> seen_;
};

}  // namespace moraine::algorithms
