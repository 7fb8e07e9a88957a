#include "comm/mpi/channel.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <thread>

#include <mpi.h>

#include "core/error.h"
#include "core/log.h"

namespace moraine::comm::mpi {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kTag = 0x4d52;
constexpr std::chrono::microseconds kFirstNap{50};
constexpr std::chrono::microseconds kLongestNap{2000};
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

/// One message on its way out; its buffers must stay until MPI is done with them.
struct Outgoing {
  std::vector<std::byte> control;
  core::Bytes payload;
  std::vector<MPI_Request> requests;
};

/// One message on its way in from one peer. Between frames `request` is null.
struct Incoming {
  std::vector<std::byte> control;
  Message message;
  std::vector<std::byte> payload;
  size_t received = 0;  // bytes of the payload, the frame under way included
  bool expects_payload = false;
  MPI_Request request = MPI_REQUEST_NULL;
};

class MpiChannel final : public Channel {
 public:
  MpiChannel(int self, int size, size_t chunk_bytes)
      : self_(self), size_(size), chunk_bytes_(chunk_bytes), incoming_(self == 0 ? static_cast<size_t>(size) : 1) {
    MORAINE_CHECK(chunk_bytes > 0 && chunk_bytes < (size_t{1} << 31), "comm/mpi: chunk size out of range: {}",
                  chunk_bytes);
  }

  ~MpiChannel() override {
    const auto end = Clock::now() + kLinger;
    auto nap = kFirstNap;
    while (settle_sends().ok() && !outgoing_->empty() && Clock::now() < end) rest(nap);
    if (outgoing_->empty()) return;
    core::log::warn("a peer does not take its last messages: process={} messages={}", self_, outgoing_->size());
    // MPI may still read these buffers: they must outlive the channel, so they are never freed.
    static_cast<void>(outgoing_.release());
  }

  int peers() const override { return self_ == 0 ? size_ - 1 : 1; }

  core::Result<void> send(int peer, Message message) override {
    MORAINE_CHECK(self_ == 0 ? peer >= 1 && peer < size_ : peer == 0, "comm/mpi: no such peer: {}", peer);
    const std::string text = control_text(message);
    const FrameHeader header{static_cast<uint16_t>(message.type), {}, message.payload.size()};
    Outgoing out;
    out.control.resize(sizeof header + text.size());
    std::memcpy(out.control.data(), &header, sizeof header);
    std::memcpy(out.control.data() + sizeof header, text.data(), text.size());
    out.payload = std::move(message.payload);
    outgoing_->push_back(std::move(out));
    if (auto sent = start_send(peer, outgoing_->back().control); !sent.ok()) return sent;
    for (auto remaining = outgoing_->back().payload.span(); !remaining.empty();) {
      const auto chunk = remaining.first(std::min(chunk_bytes_, remaining.size()));
      if (auto sent = start_send(peer, chunk); !sent.ok()) return sent;
      remaining = remaining.subspan(chunk.size());
    }
    return settle_sends();
  }

  core::Result<std::optional<Envelope>> receive(std::chrono::milliseconds deadline) override {
    const auto end = Clock::now() + deadline;
    for (auto nap = kFirstNap;; rest(nap)) {
      if (auto settled = settle_sends(); !settled.ok()) return settled.because("comm/mpi: send");
      for (int i = 0; i < peers(); ++i) {
        const int peer = self_ == 0 ? 1 + (next_ + i) % peers() : 0;
        auto complete = advance(peer);
        if (!complete.ok()) return complete.because(fmt::format("comm/mpi: receive from process {}", peer));
        if (!complete.value()) continue;
        next_ = peer % peers();  // the peer after this one goes first next time
        Incoming& in = incoming_of(peer);
        in.message.payload = core::Bytes(std::move(in.payload));
        std::optional<Envelope> envelope(Envelope{peer, std::move(in.message)});
        in = Incoming();
        return envelope;
      }
      if (Clock::now() >= end) return std::optional<Envelope>();
    }
  }

 private:
  Incoming& incoming_of(int peer) { return incoming_[self_ == 0 ? static_cast<size_t>(peer) : 0]; }

  static void rest(std::chrono::microseconds& nap) {
    std::this_thread::sleep_for(nap);
    nap = std::min(nap * 2, kLongestNap);
  }

  core::Result<void> start_send(int peer, std::span<const std::byte> bytes) {
    MPI_Request& request = outgoing_->back().requests.emplace_back(MPI_REQUEST_NULL);
    const int size = static_cast<int>(bytes.size());
    const int code = MPI_Isend(bytes.data(), size, MPI_BYTE, peer, kTag, MPI_COMM_WORLD, &request);
    if (code != MPI_SUCCESS) return core::Failure{fmt::format("comm/mpi: send to process {}: {}", peer, reason(code))};
    return {};
  }

  /// Lets MPI work on what is being sent and drops what has left.
  core::Result<void> settle_sends() {
    for (auto out = outgoing_->begin(); out != outgoing_->end();) {
      int done = 0;
      const int code =
          MPI_Testall(static_cast<int>(out->requests.size()), out->requests.data(), &done, MPI_STATUSES_IGNORE);
      if (code != MPI_SUCCESS) return core::Failure{reason(code)};
      out = done != 0 ? outgoing_->erase(out) : std::next(out);
    }
    return {};
  }

  /// Takes in what has arrived from `peer`; true when a message is complete. Frames of one peer are received one after
  /// the other and without blocking: a peer that is computing may stop in the middle of a message.
  core::Result<bool> advance(int peer) {
    Incoming& in = incoming_of(peer);
    for (;;) {
      if (in.request != MPI_REQUEST_NULL) {
        int done = 0;
        const int code = MPI_Test(&in.request, &done, MPI_STATUS_IGNORE);
        if (code != MPI_SUCCESS) return core::Failure{reason(code)};
        if (done == 0) return false;
        if (!in.expects_payload) {
          if (auto decoded = decode_control(in); !decoded.ok()) return decoded.because("bad frame");
        }
        if (in.received == in.payload.size()) return true;
      }
      auto started = start_receive(peer, in);
      if (!started.ok() || !started.value()) return started;
    }
  }

  /// Begins to receive the next frame of `peer` if it has arrived.
  core::Result<bool> start_receive(int peer, Incoming& in) {
    int found = 0;
    MPI_Message matched = MPI_MESSAGE_NULL;
    MPI_Status status;
    int code = MPI_Improbe(peer, kTag, MPI_COMM_WORLD, &found, &matched, &status);
    if (code != MPI_SUCCESS) return core::Failure{reason(code)};
    if (found == 0) return false;
    int count = 0;
    MPI_Get_count(&status, MPI_BYTE, &count);
    const auto bytes = static_cast<size_t>(count);
    std::byte* target = nullptr;
    if (in.expects_payload) {
      if (bytes > in.payload.size() - in.received) return core::Failure{"more payload than announced"};
      target = in.payload.data() + in.received;
      in.received += bytes;
    } else {
      if (bytes < sizeof(FrameHeader) || bytes > sizeof(FrameHeader) + kMaxControlBytes) {
        return core::Failure{fmt::format("control frame of {} bytes", bytes)};
      }
      in.control.resize(bytes);
      target = in.control.data();
    }
    code = MPI_Imrecv(target, count, MPI_BYTE, &matched, &in.request);
    if (code != MPI_SUCCESS) return core::Failure{reason(code)};
    return true;
  }

  static core::Result<void> decode_control(Incoming& in) {
    FrameHeader header;
    std::memcpy(&header, in.control.data(), sizeof header);
    const auto* text = reinterpret_cast<const char*>(in.control.data()) + sizeof header;
    in.message.type = static_cast<MessageType>(header.type);
    in.message.body = core::Json::parse(text, text + in.control.size() - sizeof header, nullptr, false);
    if (in.message.body.is_discarded()) return core::Failure{"control part is not JSON"};
    in.payload.resize(header.payload_bytes);
    in.expects_payload = header.payload_bytes > 0;
    return {};
  }

  int self_;
  int size_;
  size_t chunk_bytes_;
  int next_ = 0;
  std::vector<Incoming> incoming_;  // by peer
  std::unique_ptr<std::deque<Outgoing>> outgoing_ = std::make_unique<std::deque<Outgoing>>();
};

}  // namespace

std::unique_ptr<Channel> open_channel(const Session& session, size_t chunk_bytes) {
  return std::make_unique<MpiChannel>(session.index(), session.size(), chunk_bytes);
}

}  // namespace moraine::comm::mpi
