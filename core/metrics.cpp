#include "core/metrics.h"

#include <cerrno>
#include <cstring>
#include <mutex>

#include <fcntl.h>
#include <unistd.h>

#include "core/error.h"
#include "core/json.h"

namespace moraine::core::metrics {

namespace {

class JsonlSink : public Sink {
 public:
  explicit JsonlSink(const std::filesystem::path& path) : path_(path) {
    std::error_code failed;
    if (path.has_parent_path()) std::filesystem::create_directories(path.parent_path(), failed);
    if (failed) fail(failed.value());
    fd_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (fd_ < 0) fail(errno);
    if (::ftruncate(fd_, end_of_last_line()) != 0) fail(errno);
  }
  ~JsonlSink() override {
    if (fd_ >= 0) ::close(fd_);
  }
  JsonlSink(const JsonlSink&) = delete;
  JsonlSink& operator=(const JsonlSink&) = delete;

  void record(const Record& record) override {
    const std::string line =
        Json{{"unit", record.unit}, {"key", record.key}, {"step", record.step}, {"value", record.value}}.dump() + "\n";
    const std::lock_guard lock(mutex_);
    for (size_t done = 0; done < line.size();) {
      const ssize_t count = ::write(fd_, line.data() + done, line.size() - done);
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) fail(errno);
      done += static_cast<size_t>(count);
    }
  }

 private:
  // Searches backwards: the file may be long.
  off_t end_of_last_line() {
    char buffer[4096];
    off_t end = ::lseek(fd_, 0, SEEK_END);
    while (end > 0) {
      const off_t start = end > static_cast<off_t>(sizeof buffer) ? end - static_cast<off_t>(sizeof buffer) : 0;
      const ssize_t count = ::pread(fd_, buffer, static_cast<size_t>(end - start), start);
      if (count != end - start) fail(errno);
      for (ssize_t i = count; i > 0; --i)
        if (buffer[i - 1] == '\n') return start + i;
      end = start;
    }
    return 0;
  }

  [[noreturn]] void fail(int error) const {
    throw IoError(fmt::format("cannot write metrics to {}: {}", path_.string(), std::strerror(error)),
                  "check space and permissions there, then run the same command again");
  }

  std::filesystem::path path_;
  std::mutex mutex_;
  int fd_ = -1;
};

}  // namespace

std::unique_ptr<Sink> open_jsonl(const std::filesystem::path& path) { return std::make_unique<JsonlSink>(path); }

}  // namespace moraine::core::metrics
