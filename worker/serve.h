#pragma once

#include <atomic>

#include "algorithms/method.h"
#include "comm/channel.h"
#include "worker/context.h"
#include "worker/failure.h"

namespace moraine::worker {

/// A worker's side of the conversation, until the run is over: hello, then poll, lease, execute, result, poll, ...
///
///   -> kHello    {"name", "host", "pid", "threads", "device", "version", "recipe"}
///   -> kPoll     {}                          ready for a unit
///   <- kLease    {"unit": Unit::to_json(), "attempt"}
///   -> kResult   {"unit": id, "attempt", "artefact": id, "seconds", "stats": UnitContext::stats()}, payload = artefact
///   -> kFailed   {"unit", "attempt", "kind", "text", "hint"}; kind = user | io | numeric | memory | internal
///   <- kStop     {"reason"}: done | failed end the worker with 0, stop with 75; a running unit is checkpointed first
///   -> kStop     {"unit": id of the unit that was interrupted, or ""}: the last word
///   <- kRefuse   {"code", "text", "hint"}: this worker is not wanted; ends with `code`
/// While a unit runs also: -> kFetch, <- kArtefact, -> kProgress, -> kMetrics (worker/context.h), <- kStop.
///
/// Runs on the calling thread, whose ATen thread count it sets (OpenMP keeps it per thread, so the local workers of one
/// process do not disturb each other). A unit's bits depend on that count. Warns when the host's processors are
/// oversubscribed. After a unit that ran out of memory the caches are emptied. Checkpoints of a unit go away when the
/// coordinator's next lease shows that it has taken the result.
///
/// When the options name a group of several members, this is its leader: the others run serve_member()
/// (worker/members.h) and do what the leader does.
///
/// `signals` counts requests to stop from outside (SIGINT, SIGTERM); above zero stops like kStop.
/// Returns the process's exit code: 0, 75, or what kRefuse said. Throws UserError before anything runs if the options
/// cannot be met, CommError (exit code 3) when the coordinator is lost.
int serve(comm::Channel& channel, const algorithms::Method& method, const WorkerOptions& options,
          const std::atomic<int>& signals);

}  // namespace moraine::worker
