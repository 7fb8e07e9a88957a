#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include <mpi.h>

#include "core/result.h"
#include "core/safetensors.h"

namespace moraine::comm::mpi {

/// A small control part and bytes of any length.
struct Frame {
  uint16_t type = 0;
  std::vector<std::byte> control;
  core::Bytes payload;
};

/// Bytes of memory of this host.
size_t physical_memory();

struct FrameOptions {
  int tag = 0;                             // one per use: frames of one tag between two processes keep their order
  size_t chunk_bytes = 0;                  // payloads travel in pieces of this size, below 2^31; equal in all processes
  size_t max_control = 0;                  // longer control parts are refused by the receiver
  size_t max_payload = physical_memory();  // and longer payloads: nobody could hold them
  std::chrono::microseconds longest_nap{
      2000};  // waiting polls with a sleep growing from 50 us to this: processes share cores
};

/// Frames between this process and some others, `peers` by position in `processes`. On the wire: (type u16, 6 zero
/// bytes, payload bytes u64, control part; little-endian), then the payload in chunks. Sends are nonblocking and
/// progress during later calls; the destructor gives them, and pieces that are on their way in, up to 10 s and warns
/// about the rest. What a header announces is believed piece by piece: memory is taken for what has arrived. Only the
/// thread that may call MPI uses it.
class Frames {
 public:
  Frames(std::vector<int> processes, FrameOptions options);
  ~Frames();
  Frames(const Frames&) = delete;
  Frames& operator=(const Frames&) = delete;

  size_t peers() const { return processes_.size(); }
  core::Result<void> send(size_t peer, Frame frame);
  /// The next frame of anyone, peers in turn; nullopt after the deadline.
  core::Result<std::optional<std::pair<size_t, Frame>>> receive(std::chrono::milliseconds deadline);

 private:
  struct Outgoing;
  struct Incoming;
  core::Result<void> start_send(int process, std::span<const std::byte> bytes);
  core::Result<void> settle_sends();
  core::Result<bool> advance(size_t peer);
  core::Result<bool> start_receive(size_t peer);
  core::Result<void> decode(Incoming& in) const;
  bool receiving();
  void rest(std::chrono::microseconds& nap) const;

  std::vector<int> processes_;
  FrameOptions options_;
  size_t next_ = 0;
  std::unique_ptr<std::vector<Incoming>> incoming_;  // by peer
  std::unique_ptr<std::deque<Outgoing>> outgoing_;
};

}  // namespace moraine::comm::mpi
