#include "comm/mpi/group.h"

#include <array>
#include <cstring>

#include "comm/local/group.h"
#include "comm/message_group.h"
#include "comm/mpi/channel.h"
#include "comm/mpi/frames.h"
#include "core/error.h"

namespace moraine::comm::mpi {
namespace {

constexpr int kTag = 0x4d53;

/// The control part of a message; its kind is the frame's type.
struct Place {
  uint32_t epoch = 0, sequence = 0;
};

class MpiLinks final : public Links {
 public:
  MpiLinks(int index, std::vector<int> others)
      : index_(index),
        frames_(std::move(others), {.tag = kTag,
                                    .chunk_bytes = kChunkBytes,
                                    .max_control = sizeof(Place),
                                    .longest_nap = std::chrono::microseconds(200)}) {}

  int index() const override { return index_; }
  int size() const override { return static_cast<int>(frames_.peers()) + 1; }

  core::Result<void> send(int member, GroupMessage message) override {
    const Place place{message.epoch, message.sequence};
    const auto bytes = std::as_bytes(std::span(&place, 1));
    return frames_.send(
        static_cast<size_t>(member < index_ ? member : member - 1),
        {static_cast<uint16_t>(message.kind), {bytes.begin(), bytes.end()}, std::move(message.payload)});
  }

  core::Result<std::optional<std::pair<int, GroupMessage>>> receive(std::chrono::milliseconds deadline) override {
    auto received = frames_.receive(deadline);
    if (!received.ok()) return core::Failure{received.error()};
    if (!received.value()) return std::optional<std::pair<int, GroupMessage>>();
    auto& [peer, frame] = *received.value();
    Place place;
    if (frame.control.size() != sizeof place) return core::Failure{"comm/mpi: bad frame of a group"};
    std::memcpy(&place, frame.control.data(), sizeof place);
    const int member = static_cast<int>(peer) < index_ ? static_cast<int>(peer) : static_cast<int>(peer) + 1;
    return std::optional(std::pair(member, GroupMessage{static_cast<GroupMessage::Kind>(frame.type), place.epoch,
                                                        place.sequence, std::move(frame.payload)}));
  }

 private:
  int index_;
  Frames frames_;
};

}  // namespace

std::unique_ptr<Group> make_group(const Session& session, int size) {
  MORAINE_CHECK(size >= 1 && session.index() >= 1 && (session.size() - 1) % size == 0,
                "comm/mpi: no groups of {} for process {} of {}", size, session.index(), session.size());
  if (size == 1) return local::make_group();
  const int index = (session.index() - 1) % size, first = session.index() - index;
  std::vector<int> others;
  for (int process = first; process < first + size; ++process) {
    if (process != session.index()) others.push_back(process);
  }
  return make_message_group(std::make_unique<MpiLinks>(index, std::move(others)));
}

}  // namespace moraine::comm::mpi
