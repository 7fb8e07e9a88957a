#include "comm/mpi/channel.h"

#include "comm/mpi/frames.h"
#include "core/error.h"

namespace moraine::comm::mpi {
namespace {

constexpr int kTag = 0x4d52;

std::vector<int> peers_of(const Session& session, int members) {
  if (session.index() != 0) return {0};
  std::vector<int> processes;
  for (int first = 1; first < session.size(); first += members) processes.push_back(first);
  return processes;
}

class MpiChannel final : public Channel {
 public:
  MpiChannel(bool coordinates, std::vector<int> processes, size_t chunk_bytes)
      : coordinates_(coordinates),
        frames_(std::move(processes), {.tag = kTag, .chunk_bytes = chunk_bytes, .max_control = kMaxControlBytes}) {}

  int peers() const override { return static_cast<int>(frames_.peers()); }

  core::Result<void> send(int peer, Message message) override {
    MORAINE_CHECK(coordinates_ ? peer >= 1 && peer <= peers() : peer == 0, "comm/mpi: no such peer: {}", peer);
    const std::string text = control_text(message);
    const auto bytes = std::as_bytes(std::span(text));
    return frames_.send(
        static_cast<size_t>(coordinates_ ? peer - 1 : 0),
        {static_cast<uint16_t>(message.type), {bytes.begin(), bytes.end()}, std::move(message.payload)});
  }

  core::Result<std::optional<Envelope>> receive(std::chrono::milliseconds deadline) override {
    auto received = frames_.receive(deadline);
    if (!received.ok()) return core::Failure{received.error()};
    if (!received.value()) return std::optional<Envelope>();
    auto& [peer, frame] = *received.value();
    const auto* text = reinterpret_cast<const char*>(frame.control.data());
    Message message{static_cast<MessageType>(frame.type),
                    core::Json::parse(text, text + frame.control.size(), nullptr, false), std::move(frame.payload)};
    if (message.body.is_discarded()) return core::Failure{"comm/mpi: bad frame: control part is not JSON"};
    return std::optional<Envelope>(Envelope{coordinates_ ? static_cast<int>(peer) + 1 : 0, std::move(message)});
  }

 private:
  bool coordinates_;
  Frames frames_;
};

}  // namespace

std::unique_ptr<Channel> open_channel(const Session& session, int members, size_t chunk_bytes) {
  MORAINE_CHECK(members >= 1, "comm/mpi: a worker needs a process: {}", members);
  return std::make_unique<MpiChannel>(session.index() == 0, peers_of(session, members), chunk_bytes);
}

}  // namespace moraine::comm::mpi
