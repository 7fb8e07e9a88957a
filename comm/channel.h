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

/// What coordinator and workers say to each other. Numbers are stable (docs/formats.md).
enum class MessageType : uint16_t {
  kHello = 1,      // worker -> coordinator: {host, pid, threads, device, version}
  kRefuse = 2,     // coordinator -> worker: {code, text}: the worker exits
  kPoll = 3,       // worker -> coordinator: ready for a unit
  kLease = 4,      // coordinator -> worker: {unit, attempt}
  kFetch = 5,      // worker -> coordinator: {artefact}: send me this input
  kArtefact = 6,   // coordinator -> worker: {artefact}, payload = bytes
  kResult = 7,     // worker -> coordinator: {unit, attempt, artefact, stats}, payload = bytes
  kFailed = 8,     // worker -> coordinator: {unit, attempt, kind, text, hint}
  kProgress = 9,   // worker -> coordinator: {unit, done, total}
  kMetrics = 10,   // worker -> coordinator: {records: [...]}
  kStop = 11,      // coordinator -> worker: {reason}: checkpoint, then exit; worker -> coordinator: {unit}: stopped after a good checkpoint
};

struct Message {
  MessageType type = MessageType::kHello;
  core::Json body;         // control part, at most 64 KiB as text
  core::Bytes payload;     // artefact bytes or empty; local channels pass them without a copy
};

struct Envelope {
  int peer = 0;
  Message message;
};

/// One endpoint of a star: the coordinator's endpoint has the workers as peers 1..peers(), a worker's endpoint has one
/// peer, the coordinator, 0. Messages between two endpoints arrive complete and in order. An endpoint is used by one
/// thread at a time. Failure of a peer is an ordinary outcome and comes back as Result.
class Channel {
 public:
  virtual ~Channel() = default;
  virtual int peers() const = 0;
  virtual core::Result<void> send(int peer, Message message) = 0;
  /// The next message from anyone; an empty optional when the deadline passed first. Sleeps while waiting (no spinning).
  virtual core::Result<std::optional<Envelope>> receive(std::chrono::milliseconds deadline) = 0;
};

}  // namespace moraine::comm
