#include "coordinator/journal.h"

#include <bit>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <optional>

#include <fcntl.h>
#include <unistd.h>

#include "core/error.h"
#include "core/file.h"
#include "core/hash.h"
#include "core/log.h"

namespace moraine::coordinator {
namespace {

using Digest = std::array<std::byte, 32>;

struct Header {
  uint32_t body_bytes = 0;
  uint32_t crc = 0;
  uint64_t lsn = 0;
  uint16_t type = 0;
  uint16_t version = 1;
  Digest previous{};
};
constexpr size_t kHeaderBytes = 52;
constexpr size_t kCrcEnd = 8;  // the checksum covers everything after itself
// In memory as in the file, but for what pads the end.
static_assert(offsetof(Header, crc) == 4 && offsetof(Header, lsn) == kCrcEnd && offsetof(Header, type) == 16 &&
              offsetof(Header, version) == 18 && offsetof(Header, previous) == 20 &&
              std::endian::native == std::endian::little);

std::span<const std::byte> bytes_of(std::string_view text) { return std::as_bytes(std::span(text)); }

Digest digest(std::span<const std::byte> data) {
  const std::string hex = core::sha256(data);
  Digest out;
  for (size_t i = 0; i < out.size(); ++i) {
    out[i] = static_cast<std::byte>(std::stoi(hex.substr(2 * i, 2), nullptr, 16));
  }
  return out;
}

std::string encode(Header header, const std::string& body) {
  header.body_bytes = static_cast<uint32_t>(body.size());
  std::string out(kHeaderBytes, '\0');
  std::memcpy(out.data(), &header, kHeaderBytes);
  out += body;
  header.crc = core::crc32c(bytes_of(out).subspan(kCrcEnd));
  std::memcpy(out.data() + offsetof(Header, crc), &header.crc, sizeof header.crc);
  return out;
}

/// The record at `offset`, nullopt if it is incomplete or its checksum is wrong. `from_lsn` rejects noise cheaply.
std::optional<Header> decode(std::string_view file, size_t offset, uint64_t from_lsn) {
  if (file.size() - offset < kHeaderBytes) return std::nullopt;
  Header header;
  std::memcpy(static_cast<void*>(&header), file.data() + offset, kHeaderBytes);
  if (header.body_bytes > kMaxRecordBody || header.body_bytes > file.size() - offset - kHeaderBytes)
    return std::nullopt;
  if (header.lsn < from_lsn) return std::nullopt;
  const auto covered = bytes_of(file.substr(offset, kHeaderBytes + header.body_bytes)).subspan(kCrcEnd);
  return core::crc32c(covered) == header.crc ? std::optional(header) : std::nullopt;
}

struct Contents {
  std::vector<Record> records;
  size_t valid_bytes = 0;
  Digest last_hash{};
};

[[noreturn]] void refuse(const std::string& path, const std::string& what) {
  throw core::IoError(
      fmt::format("coordinator/journal: {} is damaged: {}", path, what),
      "restore the file from a backup, or use another --run-dir; the artefacts themselves are not lost");
}

Contents scan(std::string_view file, const std::string& path) {
  Contents contents;
  size_t offset = 0;
  while (offset < file.size()) {
    const uint64_t lsn = contents.records.size() + 1;
    const auto header = decode(file, offset, lsn);
    if (!header) break;
    if (header->lsn != lsn || header->previous != contents.last_hash) {
      refuse(path, fmt::format("the record at byte {} does not follow the one before it (found lsn {}, expected {})",
                               offset, header->lsn, lsn));
    }
    if (header->type < static_cast<uint16_t>(RecordType::kEpoch) ||
        header->type > static_cast<uint16_t>(RecordType::kDone) || header->version != 1) {
      throw core::UserError(fmt::format("coordinator/journal: {}: unknown record at byte {}: type={} version={}", path,
                                        offset, header->type, header->version),
                            "a newer Moraine wrote this run directory: use that version");
    }
    const std::string_view record = file.substr(offset, kHeaderBytes + header->body_bytes);
    contents.records.push_back(
        {header->lsn, static_cast<RecordType>(header->type),
         core::parse_json(record.substr(kHeaderBytes), fmt::format("{} byte {}", path, offset))});
    contents.last_hash = digest(bytes_of(record));
    offset += record.size();
  }
  contents.valid_bytes = offset;
  for (size_t later = offset + 1; later < file.size(); ++later) {
    if (decode(file, later, contents.records.size() + 1)) {
      refuse(path, fmt::format("the record at byte {} is bad, but a valid one follows at byte {} of {}", offset, later,
                               file.size()));
    }
  }
  return contents;
}

}  // namespace

Journal::Journal(const std::filesystem::path& path) : path_(path) {
  if (!std::filesystem::exists(path)) core::write_atomically(path, std::string_view());
  const std::string file = core::read_text(path);
  Contents contents = scan(file, path.string());
  fd_ = ::open(path.c_str(), O_WRONLY | O_CLOEXEC);
  if (fd_ < 0) {
    throw core::IoError(fmt::format("coordinator/journal: cannot open {}: {}", path.string(), std::strerror(errno)),
                        "check the permissions of the run directory");
  }
  if (contents.valid_bytes < file.size()) {
    core::log::warn(
        "journal: cut an unfinished record (a crash or a full disk left it): path={} at_bytes={} cut_bytes={}",
        path.string(), contents.valid_bytes, file.size() - contents.valid_bytes);
  }
  const auto end = static_cast<off_t>(contents.valid_bytes);
  if (::ftruncate(fd_, end) != 0 || ::lseek(fd_, end, SEEK_SET) != end || ::fdatasync(fd_) != 0) {
    const int error = errno;
    ::close(fd_);
    throw core::IoError(fmt::format("coordinator/journal: cannot prepare {}: {}", path.string(), std::strerror(error)),
                        "check the disk under the run directory");
  }
  records_ = std::move(contents.records);
  next_lsn_ = records_.size() + 1;
  last_hash_ = contents.last_hash;
}

Journal::~Journal() {
  if (fd_ >= 0) ::close(fd_);
}

void Journal::append(RecordType type, const core::Json& body) {
  // Texts of failures may hold any bytes.
  const std::string text = body.dump(-1, ' ', false, core::Json::error_handler_t::replace);
  MORAINE_CHECK(text.size() <= kMaxRecordBody, "journal: record is too long: type={} bytes={}", static_cast<int>(type),
                text.size());
  const std::string record =
      encode({.lsn = next_lsn_, .type = static_cast<uint16_t>(type), .previous = last_hash_}, text);
  const auto fail = [this](int error) {
    broken_ = true;
    throw core::IoError(fmt::format("coordinator/journal: cannot write {}: {}", path_.string(), std::strerror(error)),
                        "free space or repair the disk, then run the same command again; everything finished is kept");
  };
  if (broken_) fail(EIO);
  for (std::string_view left = record; !left.empty();) {
    const ssize_t written = ::write(fd_, left.data(), left.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) fail(errno);
    left.remove_prefix(static_cast<size_t>(written));
  }
  if (::fdatasync(fd_) != 0) fail(errno);
  last_hash_ = digest(bytes_of(record));
  ++next_lsn_;
}

std::vector<Record> read_journal(const std::filesystem::path& path) {
  if (!std::filesystem::exists(path)) return {};
  return scan(core::read_text(path), path.string()).records;
}

}  // namespace moraine::coordinator
