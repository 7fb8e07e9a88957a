#include "core/tensorboard.h"

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <mutex>

#include <fcntl.h>
#include <unistd.h>

#include "core/error.h"
#include "core/hash.h"

namespace moraine::core::metrics {

namespace {

namespace fs = std::filesystem;

template <typename T>
void append_raw(std::string& out, T value) {
  char bytes[sizeof value];
  std::memcpy(bytes, &value, sizeof value);
  out.append(bytes, sizeof value);
}

void append_varint(std::string& out, uint64_t value) {
  for (; value >= 0x80; value >>= 7) out.push_back(static_cast<char>(value | 0x80));
  out.push_back(static_cast<char>(value));
}

// Keys of protobuf fields: number and wire type.
void append_key(std::string& out, uint32_t field, uint32_t type) { append_varint(out, field << 3 | type); }
constexpr uint32_t kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5;

void append_bytes(std::string& out, uint32_t field, const std::string& bytes) {
  append_key(out, field, kBytes);
  append_varint(out, bytes.size());
  out += bytes;
}

std::string event(double wall_time, int64_t step) {
  std::string out;
  append_key(out, 1, kFixed64);
  append_raw(out, wall_time);
  if (step != 0) {
    append_key(out, 2, kVarint);
    append_varint(out, static_cast<uint64_t>(step));
  }
  return out;
}

std::string version_event(double wall_time) {
  std::string out = event(wall_time, 0);
  append_bytes(out, 3, "brain.Event:2");
  return out;
}

std::string scalar_event(double wall_time, const Record& record) {
  std::string value;
  append_bytes(value, 1, record.key);
  append_key(value, 2, kFixed32);
  append_raw(value, static_cast<float>(record.value));
  std::string summary;
  append_bytes(summary, 1, value);
  std::string out = event(wall_time, record.step);
  append_bytes(out, 5, summary);
  return out;
}

// The mask keeps checksums of data that hold checksums apart.
uint32_t masked_crc(const std::string& bytes) {
  const uint32_t crc = crc32c(std::as_bytes(std::span(bytes)));
  return ((crc >> 15) | (crc << 17)) + 0xa282ead8u;
}

std::string frame(const std::string& data) {
  std::string out;
  append_raw(out, static_cast<uint64_t>(data.size()));
  append_raw(out, masked_crc(out));
  out += data;
  append_raw(out, masked_crc(data));
  return out;
}

double now() { return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count(); }

fs::path directory_of(const std::string& unit) {
  std::string text = unit;
  for (char& c : text)
    if (std::isalnum(static_cast<unsigned char>(c)) == 0 && std::strchr("/-_.", c) == nullptr) c = '_';
  fs::path path;
  for (const fs::path& part : fs::path(text).relative_path())
    path /= part == ".." || part == "." ? fs::path("_") : part;
  return path.empty() ? fs::path("_") : path;
}

class TensorBoardSink : public Sink {
 public:
  explicit TensorBoardSink(fs::path directory)
      : directory_(std::move(directory)),
        file_(fmt::format("events.out.tfevents.{}.moraine", static_cast<int64_t>(now()))) {}

  void record(const Record& record) override {
    const std::lock_guard lock(mutex_);
    const fs::path path = directory_ / directory_of(record.unit) / file_;
    std::error_code failed;
    fs::create_directories(path.parent_path(), failed);
    if (failed) fail(path, failed.value());
    // Opened for every record: there may be more units than a process may have files, and a few records come a second.
    const int fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (fd < 0) fail(path, errno);
    const double time = now();
    std::string text = ::lseek(fd, 0, SEEK_END) == 0 ? frame(version_event(time)) : "";
    text += frame(scalar_event(time, record));
    const ssize_t written = ::write(fd, text.data(), text.size());
    const int error = written < 0 ? errno : ENOSPC;
    ::close(fd);
    if (written != static_cast<ssize_t>(text.size())) fail(path, error);
  }

 private:
  [[noreturn]] static void fail(const fs::path& path, int error) {
    throw IoError(fmt::format("cannot write metrics to {}: {}", path.string(), std::strerror(error)),
                  "check space and permissions there, then run the same command again");
  }

  const fs::path directory_;
  const std::string file_;
  std::mutex mutex_;
};

}  // namespace

std::unique_ptr<Sink> open_tensorboard(const fs::path& directory) {
  return std::make_unique<TensorBoardSink>(directory);
}

}  // namespace moraine::core::metrics
