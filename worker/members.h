#pragma once

#include <atomic>
#include <string>

#include "algorithms/method.h"
#include "comm/group.h"
#include "core/error.h"
#include "worker/context.h"
#include "worker/failure.h"

namespace moraine::worker {

/// A worker may be a group of processes (or threads) that train one unit data-parallel. Member 0, the leader, speaks
/// with the coordinator; every member executes the same units and makes the same calls of its context, so input
/// artefacts, the start of a training and every step are agreed on by collectives of the group. Only the leader
/// checkpoints, sends metrics and the result. Work outside training is done by every member for itself.
///
/// A member that fails renews the group (comm/group.h); the others fail at their next collective, everyone tells how it
/// ended, and the leader reports the first true reason. A member that is gone ends the worker; the coordinator leases
/// its unit to another.

/// Thrown where the group failed under a member: another one gave up, is gone or is silent. Exit code 3.
struct GroupFailed : core::IoError {
  explicit GroupFailed(const std::string& message)
      : IoError("worker: " + message, "look at the logs of the other members of this worker's group") {}
};

/// How a unit ended for the whole group; a group of one decides alone.
struct UnitEnd {
  enum class Kind { kDone, kStopped, kFailed };
  Kind kind = Kind::kFailed;
  core::ArtefactPtr artefact;  // of kDone
  FailureReport failure;       // of kFailed; of kStopped the text
};

/// Runs a unit as one member and agrees with the others on how it ended. Rethrows CommError of the coordinator's
/// channel; throws CommError when a member is gone.
UnitEnd execute_together(const algorithms::Method& method, const algorithms::Unit& unit, int64_t attempt,
                         const WorkerOptions& options, UnitContext& context);

/// The leader's calls: a unit (body of kLease), and the end with the exit code of every member.
void call_members(comm::Group& group, const core::Json& lease);
void dismiss_members(comm::Group& group, int exit_code);

/// A member's side other than the leader's: executes what the leader calls until it dismisses. Returns the leader's
/// exit code. Throws as serve() before anything runs, CommError when the leader is gone.
int serve_member(const algorithms::Method& method, const WorkerOptions& options, const std::atomic<int>& signals);

/// What every worker's thread does first: checks the options, sets ATen's thread count and the device.
void prepare_thread(const WorkerOptions& options);

}  // namespace moraine::worker
