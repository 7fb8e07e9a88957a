#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/json.h"

namespace moraine::coordinator {

/// What a journal says; bodies are JSON (docs/recovery.md). Numbers are stable.
enum class RecordType : uint16_t {
  kEpoch = 1,   // a start: {version, processes, time}
  kAccept = 2,  // {unit, kind, label, artefact, worker, host, attempt, started, ended, seconds, stats}
  kFail = 3,    // {unit, unit_kind, label, attempt, worker, host, kind, text, started, time}
  kStop = 4,    // stopped before the end: {reason, time, coordinating_s, planning_s}
  kDone = 5,    // the plan has nothing left: {time, coordinating_s, planning_s}
};

struct Record {
  uint64_t lsn = 0;  // 1, 2, 3, ...
  RecordType type = RecordType::kEpoch;
  core::Json body;
};

/// Longest body in bytes: a control frame (64 KiB) with our own keys around it always fits.
inline constexpr size_t kMaxRecordBody = 128 << 10;

/// Append-only file that says what was accepted, in order. Record, little-endian:
///
///   len u32 | crc32c u32 | lsn u64 | type u16 | version u16 | prev_hash 32 B | body (len bytes)
///
/// crc32c covers what follows it. prev_hash is the SHA-256 of the whole previous record (zeros for the first), so
/// records cannot be changed, dropped or reordered unnoticed. Every byte prefix of a journal is a valid older state: a
/// torn tail is cut with a warning. Damage with valid records after it is refused, because what was accepted there
/// would be lost. Not thread-safe; one process at a time (RunDirectory holds the lock).
class Journal {
 public:
  /// Opens or creates. Throws IoError naming offsets if the file is damaged in the middle, UserError if a newer Moraine
  /// wrote it.
  explicit Journal(const std::filesystem::path& path);
  ~Journal();
  Journal(const Journal&) = delete;
  Journal& operator=(const Journal&) = delete;

  /// What the file held when it was opened; until take_records().
  const std::vector<Record>& records() const { return records_; }
  /// Hands them over: nobody needs them twice and a long run has many.
  std::vector<Record> take_records() { return std::move(records_); }
  /// Durable when it returns. Throws IoError; after that the journal takes nothing more (a failed sync may have lost
  /// pages).
  void append(RecordType type, const core::Json& body);

 private:
  std::filesystem::path path_;
  int fd_ = -1;
  bool broken_ = false;
  uint64_t next_lsn_ = 1;
  std::array<std::byte, 32> last_hash_{};
  std::vector<Record> records_;
};

/// Reads a journal that another process may be writing: a torn tail is left alone. Throws as Journal does; a missing
/// file has no records.
std::vector<Record> read_journal(const std::filesystem::path& path);

}  // namespace moraine::coordinator
