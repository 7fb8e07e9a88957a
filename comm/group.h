#pragma once

#include <chrono>
#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "core/result.h"
#include "core/safetensors.h"

namespace moraine::comm {

/// A sum on its way. Destroying it before it is finished is allowed; the buffer is not touched afterwards.
class Reduction {
 public:
  virtual ~Reduction() = default;
  /// Waits until the buffer holds the sum. Fails when the deadline passes first or a member it needs is gone.
  virtual core::Result<void> wait(std::chrono::milliseconds deadline) = 0;
};

/// Collectives among the processes (or threads) of one worker, which train one unit together. Member 0 is the leader.
/// Every member makes the same calls in the same order; a member that does something else is noticed ("out of step"),
/// not waited for. Used by one thread of a member at a time.
///
/// Back ends: local/ (one member), threads/ (members of one process), mpi/ (CPU), nccl/ (sums on GPUs, the rest over
/// mpi). A sum adds the members' values in the order of their indices, element by element, so its bits depend on the
/// number of members and on nothing else, and threads/ and mpi/ give the same. nccl/ has an order of its own that is
/// fixed for one machine and one group size.
///
/// Failure of a member is an ordinary outcome: it comes back as Result and leaves the group unusable until every
/// member has called renew().
class Group {
 public:
  virtual ~Group() = default;
  virtual int index() const = 0;
  virtual int size() const = 0;
  /// Whether all_reduce() takes CUDA memory of this member's device instead of host memory.
  virtual bool on_device() const { return false; }

  /// Starts to replace `buffer` by the sum over all members; it must stay alive and alone until wait() or the handle's
  /// destruction. Members pass equal sizes. Sums are finished in any order. Work on CUDA memory that was enqueued on
  /// the legacy default stream before the call is waited for; wait() returns when the sum is there for every stream.
  virtual std::unique_ptr<Reduction> all_reduce(std::span<float> buffer) = 0;

  /// Member 0's bytes replace everybody's. Member 0 does not wait and gets true. The others: false when the deadline
  /// passed before the bytes came; nothing has happened then and the call may be repeated.
  virtual core::Result<bool> broadcast(core::Bytes& bytes, std::chrono::milliseconds deadline) = 0;

  /// Everybody's bytes for everybody, by index of the member.
  virtual core::Result<std::vector<core::Bytes>> gather(core::Bytes mine, std::chrono::milliseconds deadline) = 0;

  /// Returns when every member has called it.
  core::Result<void> barrier(std::chrono::milliseconds deadline);

  /// Lets transfers proceed without waiting; fails when a member is gone or has called renew() before this one.
  virtual core::Result<void> poll() = 0;

  /// Gives up whatever is under way; what other members still wait for from this one fails there. When all members have
  /// called it the group works again, unless a member is gone.
  virtual void renew() = 0;
};

/// Bytes of a text or of plain values, for broadcast() and gather().
core::Bytes bytes_of(std::span<const std::byte> data);

}  // namespace moraine::comm
