#pragma once

#include <cstddef>
#include <memory>

#include "comm/channel.h"
#include "comm/mpi/session.h"

namespace moraine::comm::mpi {

/// Largest piece of a payload in bytes; MPI counts are int, so it stays below 2^31. Lowered in tests only.
inline constexpr size_t kChunkBytes = size_t{256} << 20;

/// This process's endpoint: process 0 is the coordinator, process i its peer i; all use one chunk size. On the wire a
/// message is a control frame (type u16, 6 zero bytes, payload bytes u64, JSON text; little-endian) and then the
/// payload in chunks. Waiting polls with a sleep growing from 50 us to 2 ms, because the processes may share cores.
/// Sends are nonblocking and progress during later calls; the destructor gives them up to 10 s and warns about the
/// rest. A dead process ends the job (Open MPI 4.1 has no recovery), so kGone never comes from here.
std::unique_ptr<Channel> open_channel(const Session& session, size_t chunk_bytes = kChunkBytes);

}  // namespace moraine::comm::mpi
