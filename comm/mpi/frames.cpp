#include "comm/mpi/frames.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <new>
#include <thread>

#include <unistd.h>

#include "core/error.h"
#include "core/log.h"

namespace moraine::comm::mpi {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::microseconds kFirstNap{50};
constexpr std::chrono::seconds kLinger{10};

struct FrameHeader {
  uint16_t type = 0;
  std::array<uint8_t, 6> zero{};
  uint64_t payload_bytes = 0;
};
static_assert(sizeof(FrameHeader) == 16);

std::string reason(int code) {
  char text[MPI_MAX_ERROR_STRING] = {};
  int length = 0;
  MPI_Error_string(code, text, &length);
  return {text, static_cast<size_t>(length)};
}

}  // namespace

size_t physical_memory() {
  const auto pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGE_SIZE);
  return pages > 0 && page > 0 ? static_cast<size_t>(pages) * static_cast<size_t>(page) : SIZE_MAX;
}

/// One frame on its way out; its buffers must stay until MPI is done with them.
struct Frames::Outgoing {
  std::vector<std::byte> control;
  core::Bytes payload;
  std::vector<MPI_Request> requests;
};

/// One frame on its way in from one peer. Between pieces `request` is null.
struct Frames::Incoming {
  std::vector<std::byte> control;  // with the header
  uint16_t type = 0;
  uint64_t announced = 0;          // bytes of the payload
  std::vector<std::byte> payload;  // what has arrived, the piece under way included
  bool expects_payload = false;
  MPI_Request request = MPI_REQUEST_NULL;
};

Frames::Frames(std::vector<int> processes, FrameOptions options)
    : processes_(std::move(processes)),
      options_(options),
      incoming_(std::make_unique<std::vector<Incoming>>(processes_.size())),
      outgoing_(std::make_unique<std::deque<Outgoing>>()) {
  MORAINE_CHECK(options.chunk_bytes > 0 && options.chunk_bytes < (size_t{1} << 31),
                "comm/mpi: chunk size out of range: {}", options.chunk_bytes);
}

Frames::~Frames() {
  const auto end = Clock::now() + kLinger;
  auto nap = kFirstNap;
  while (settle_sends().ok() && (!outgoing_->empty() || receiving()) && Clock::now() < end) rest(nap);
  // MPI may still read or write these buffers: they must outlive this object, so they are never freed.
  if (!outgoing_->empty()) {
    core::log::warn("a peer does not take its last messages: messages={}", outgoing_->size());
    static_cast<void>(outgoing_.release());
  }
  if (receiving()) {
    core::log::warn("a peer does not finish its last message");
    static_cast<void>(incoming_.release());
  }
}

/// Whether MPI may still write to a buffer of ours.
bool Frames::receiving() {
  return std::ranges::any_of(*incoming_, [](Incoming& in) {
    int done = 1;
    return in.request != MPI_REQUEST_NULL &&
           (MPI_Test(&in.request, &done, MPI_STATUS_IGNORE) != MPI_SUCCESS || done == 0);
  });
}

core::Result<void> Frames::send(size_t peer, Frame frame) {
  const int process = processes_.at(peer);
  const FrameHeader header{frame.type, {}, frame.payload.size()};
  Outgoing out;
  out.control.resize(sizeof header + frame.control.size());
  std::memcpy(out.control.data(), &header, sizeof header);
  std::ranges::copy(frame.control, out.control.begin() + sizeof header);
  out.payload = std::move(frame.payload);
  outgoing_->push_back(std::move(out));
  if (auto sent = start_send(process, outgoing_->back().control); !sent.ok()) return sent;
  for (auto remaining = outgoing_->back().payload.span(); !remaining.empty();) {
    const auto chunk = remaining.first(std::min(options_.chunk_bytes, remaining.size()));
    if (auto sent = start_send(process, chunk); !sent.ok()) return sent;
    remaining = remaining.subspan(chunk.size());
  }
  return settle_sends();
}

core::Result<std::optional<std::pair<size_t, Frame>>> Frames::receive(std::chrono::milliseconds deadline) {
  const auto end = Clock::now() + deadline;
  for (auto nap = kFirstNap;; rest(nap)) {
    if (auto settled = settle_sends(); !settled.ok()) return settled.because("comm/mpi: send");
    for (size_t i = 0; i < peers(); ++i) {
      const size_t peer = (next_ + i) % peers();
      auto complete = advance(peer);
      if (!complete.ok()) return complete.because(fmt::format("comm/mpi: receive from process {}", processes_[peer]));
      if (!complete.value()) continue;
      next_ = (peer + 1) % peers();  // the peer after this one goes first next time
      Incoming& in = (*incoming_)[peer];
      in.control.erase(in.control.begin(), in.control.begin() + sizeof(FrameHeader));
      std::optional<std::pair<size_t, Frame>> arrived(
          std::pair(peer, Frame{in.type, std::move(in.control), core::Bytes(std::move(in.payload))}));
      in = Incoming();
      return arrived;
    }
    if (Clock::now() >= end) return std::optional<std::pair<size_t, Frame>>();
  }
}

void Frames::rest(std::chrono::microseconds& nap) const {
  std::this_thread::sleep_for(nap);
  nap = std::min(nap * 2, options_.longest_nap);
}

core::Result<void> Frames::start_send(int process, std::span<const std::byte> bytes) {
  MPI_Request& request = outgoing_->back().requests.emplace_back(MPI_REQUEST_NULL);
  const int size = static_cast<int>(bytes.size());
  const int code = MPI_Isend(bytes.data(), size, MPI_BYTE, process, options_.tag, MPI_COMM_WORLD, &request);
  if (code != MPI_SUCCESS) return core::Failure{fmt::format("comm/mpi: send to process {}: {}", process, reason(code))};
  return {};
}

/// Lets MPI work on what is being sent and drops what has left.
core::Result<void> Frames::settle_sends() {
  for (auto out = outgoing_->begin(); out != outgoing_->end();) {
    int done = 0;
    const int code =
        MPI_Testall(static_cast<int>(out->requests.size()), out->requests.data(), &done, MPI_STATUSES_IGNORE);
    if (code != MPI_SUCCESS) return core::Failure{reason(code)};
    out = done != 0 ? outgoing_->erase(out) : std::next(out);
  }
  return {};
}

/// Takes in what has arrived from `peer`; true when a frame is complete. Pieces of one peer are received one after the
/// other and without blocking: a peer that is computing may stop in the middle of a frame.
core::Result<bool> Frames::advance(size_t peer) {
  Incoming& in = (*incoming_)[peer];
  for (;;) {
    if (in.request != MPI_REQUEST_NULL) {
      int done = 0;
      const int code = MPI_Test(&in.request, &done, MPI_STATUS_IGNORE);
      if (code != MPI_SUCCESS) return core::Failure{reason(code)};
      if (done == 0) return false;
      if (!in.expects_payload) {
        if (auto decoded = decode(in); !decoded.ok()) return core::Failure{decoded.error()};
      }
      if (in.payload.size() == in.announced) return true;
    }
    auto started = start_receive(peer);
    if (!started.ok() || !started.value()) return started;
  }
}

/// Begins to receive the next piece of `peer` if it has arrived.
core::Result<bool> Frames::start_receive(size_t peer) {
  Incoming& in = (*incoming_)[peer];
  int found = 0;
  MPI_Message matched = MPI_MESSAGE_NULL;
  MPI_Status status;
  int code = MPI_Improbe(processes_[peer], options_.tag, MPI_COMM_WORLD, &found, &matched, &status);
  if (code != MPI_SUCCESS) return core::Failure{reason(code)};
  if (found == 0) return false;
  int count = 0;
  MPI_Get_count(&status, MPI_BYTE, &count);
  const auto bytes = static_cast<size_t>(count);
  std::byte* target = nullptr;
  if (in.expects_payload) {
    const size_t before = in.payload.size();
    if (bytes == 0 || bytes > in.announced - before) return core::Failure{"another payload than announced"};
    in.payload.resize(before + bytes);
    target = in.payload.data() + before;
  } else {
    if (bytes < sizeof(FrameHeader) || bytes > sizeof(FrameHeader) + options_.max_control) {
      return core::Failure{fmt::format("control frame of {} bytes", bytes)};
    }
    in.control.resize(bytes);
    target = in.control.data();
  }
  code = MPI_Imrecv(target, count, MPI_BYTE, &matched, &in.request);
  if (code != MPI_SUCCESS) return core::Failure{reason(code)};
  return true;
}

core::Result<void> Frames::decode(Incoming& in) const {
  FrameHeader header;
  std::memcpy(&header, in.control.data(), sizeof header);
  if (header.zero != FrameHeader().zero) return core::Failure{"bytes that are no frame"};
  const auto refuse = [&](const std::string& why) {
    return core::Failure{fmt::format("a payload of {} bytes is announced: {}", header.payload_bytes, why)};
  };
  if (header.payload_bytes > options_.max_payload)
    return refuse(fmt::format("the limit is the memory of this host, {} bytes", options_.max_payload));
  try {
    in.payload.reserve(header.payload_bytes);  // address space only: memory is taken as pieces arrive
  } catch (const std::bad_alloc&) {
    return refuse("out of memory");
  }
  in.type = header.type;
  in.announced = header.payload_bytes;
  in.expects_payload = header.payload_bytes > 0;
  return {};
}

}  // namespace moraine::comm::mpi
