#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>

#include "comm/group.h"

namespace moraine::comm {

/// What members of a message group say to each other.
struct GroupMessage {
  enum class Kind : uint16_t {
    kBroadcast = 1,
    kGather = 2,
    kPart = 3,  // the receiver's slice of the sender's buffer
    kSum = 4,   // the sender's slice of the sum
    kGone = 5,  // made by the links themselves, never sent: the sender will not speak again
  };
  Kind kind = Kind::kGone;
  uint32_t epoch = 0;     // how often the sender had called renew()
  uint32_t sequence = 0;  // number of the collective within its epoch
  core::Bytes payload;
};

/// One member's links to all others. Messages between two members arrive complete and in order.
class Links {
 public:
  virtual ~Links() = default;
  virtual int index() const = 0;
  virtual int size() const = 0;
  /// Queues a message; does not wait. To a member that is gone: no failure, receive() tells it.
  virtual core::Result<void> send(int member, GroupMessage message) = 0;
  /// The next message of anyone, nullopt after the deadline; zero looks without waiting.
  virtual core::Result<std::optional<std::pair<int, GroupMessage>>> receive(std::chrono::milliseconds deadline) = 0;
};

/// The collectives of Group in terms of messages, for any links: that is why all of them give the same bits.
///
/// A sum: every member owns one slice of the buffer. It gets that slice of all others, adds them in the order of the
/// members' indices and sends the sum back. Each member sends and receives 2 (n - 1) / n of the buffer, as a ring does,
/// in two steps instead of 2 (n - 1); the price of the fixed order is that no sum of parts is shared on the way. The
/// adding is done by the caller's thread inside all_reduce(), poll() and wait(): processors are not idle while
/// backward runs, so only waiting for others is hidden, not the adding itself.
std::unique_ptr<Group> make_message_group(std::unique_ptr<Links> links);

}  // namespace moraine::comm
