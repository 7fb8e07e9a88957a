#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "core/json.h"
#include "core/result.h"
#include "core/safetensors.h"

namespace moraine::comm {

/// What coordinator and workers say to each other, with the keys of each body. Numbers are stable; docs/recovery.md
/// tells the conversation. `unit` and `artefact` are ids, `attempt` counts from 1.
enum class MessageType : uint16_t {
  kHello = 1,     // worker -> coordinator: {host, pid, threads, device, version, recipe}: first words of a worker
  kRefuse = 2,    // coordinator -> worker: {code, text, hint}: the worker exits with that code
  kPoll = 3,      // worker -> coordinator: {}: ready for a unit; answered by kLease as soon as there is one
  kLease = 4,     // coordinator -> worker: {unit: Unit::to_json, attempt}
  kFetch = 5,     // worker -> coordinator: {artefact}: send me this input
  kArtefact = 6,  // coordinator -> worker: {artefact}, payload = bytes; {artefact, error} when it cannot
  kResult = 7,  // worker -> coordinator: {unit, attempt, artefact, seconds, stats: {...}}, payload = bytes; then kPoll
  kFailed = 8,  // worker -> coordinator: {unit, attempt, kind: user|io|numeric|internal|memory, text, hint}; then kPoll
  kProgress = 9,  // worker -> coordinator: {unit, done, total}: numbers, any measure
  kMetrics = 10,  // worker -> coordinator: {records: [{unit: label, key, step, value}, ...]}
  kStop = 11,     // coordinator -> worker: {reason: done|failed|stop}: checkpoint, answer, exit
                  // worker -> coordinator: {unit}: nothing more will come; unit = "" when none was running
  kGone = 12,     // {reason, code, hint}: this peer will not speak again; made by the coordinator's endpoint itself, or
                  // worker -> coordinator: it cannot start and ends with `code`
};

/// Longest control part in bytes of JSON text; send() throws InternalError beyond it. What is larger travels as
/// payload.
inline constexpr size_t kMaxControlBytes = 64 << 10;

struct Message {
  MessageType type = MessageType::kHello;
  core::Json body;      // control part, at most kMaxControlBytes as text
  core::Bytes payload;  // artefact bytes or empty; local channels pass them without a copy
};

struct Envelope {
  int peer = 0;
  Message message;
};

/// One endpoint of a star: the coordinator's endpoint has the workers as peers 1..peers(), a worker's endpoint has one
/// peer, the coordinator, 0. Messages between two endpoints arrive complete and in order. An endpoint is used by one
/// thread at a time. Failure of a peer is an ordinary outcome and comes back as Result; a worker's endpoint fails for
/// good when the coordinator is gone, the coordinator's receives kGone.
class Channel {
 public:
  virtual ~Channel() = default;
  virtual int peers() const = 0;
  /// Queues a message; does not wait for the peer.
  virtual core::Result<void> send(int peer, Message message) = 0;
  /// The next message from anyone; an empty optional when the deadline passed first. Sleeps while waiting (no
  /// spinning).
  virtual core::Result<std::optional<Envelope>> receive(std::chrono::milliseconds deadline) = 0;
};

/// The control part as text. Throws InternalError naming the message type if it is longer than kMaxControlBytes.
std::string control_text(const Message& message);

}  // namespace moraine::comm
