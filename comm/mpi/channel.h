#pragma once

#include <cstddef>
#include <memory>

#include "comm/channel.h"
#include "comm/mpi/session.h"

namespace moraine::comm::mpi {

/// Largest piece of a payload in bytes; MPI counts are int, so it stays below 2^31. Lowered in tests only.
inline constexpr size_t kChunkBytes = size_t{256} << 20;

/// This process's endpoint: process 0 is the coordinator; its peers are the first processes of `members` each (peer i
/// is process 1 + (i - 1) * members), a worker of several processes speaks through its first. All processes use one
/// chunk size. A message travels as a frame (comm/mpi/frames.h) whose control part is the body as JSON text. A dead
/// process ends the job (Open MPI 4.1 has no recovery), so kGone never comes from here.
std::unique_ptr<Channel> open_channel(const Session& session, int members = 1, size_t chunk_bytes = kChunkBytes);

}  // namespace moraine::comm::mpi
