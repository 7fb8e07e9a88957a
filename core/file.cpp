#include "core/file.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <random>
#include <utility>

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/error.h"

namespace moraine::core {

namespace {

namespace fs = std::filesystem;

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() { close(); }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }
  bool ok() const { return fd_ >= 0; }
  bool close() {
    const int fd = std::exchange(fd_, -1);
    return fd < 0 || ::close(fd) == 0;
  }

 private:
  int fd_;
};

std::string hint_for(int error) {
  switch (error) {
    case ENOSPC:
    case EDQUOT:
      return "free space there or choose another directory, then run the same command again; finished work is kept";
    case EFBIG:
      return "raise the file size limit (ulimit -f), then run the same command again; finished work is kept";
    case EACCES:
    case EPERM:
    case EROFS:
      return "choose a directory you can write to, or change its permissions";
    default:
      return "check the path and the disk, then run the same command again";
  }
}

[[noreturn]] void throw_write_failed(const fs::path& path, size_t bytes, int error) {
  throw IoError(fmt::format("cannot write {} ({} bytes): {}", path.string(), bytes, std::strerror(error)),
                hint_for(error));
}

// Returns 0 or errno.
int write_all(int fd, std::span<const std::byte> data) {
  while (!data.empty()) {
    const ssize_t written = ::write(fd, data.data(), data.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return errno;
    data = data.subspan(static_cast<size_t>(written));
  }
  return 0;
}

int write_new_file(const fs::path& path, std::span<const std::byte> data) {
  Descriptor file(::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
  if (!file.ok()) return errno;
  if (const int error = write_all(file.get(), data)) return error;
  if (::fdatasync(file.get()) != 0) return errno;
  return file.close() ? 0 : errno;
}

[[noreturn]] void throw_read_failed(const fs::path& path, int error) {
  if (error == ENOENT || error == ENOTDIR)
    throw UserError(fmt::format("no such file: {}", path.string()), "check the path");
  throw IoError(fmt::format("cannot read {}: {}", path.string(), std::strerror(error)),
                error == EACCES || error == EPERM ? "change the permissions of the file or of a directory on its path"
                                                  : "check the path and the disk");
}

const char* kind_of(mode_t mode) {
  if (S_ISDIR(mode)) return "a directory";
  if (S_ISFIFO(mode)) return "a pipe";
  if (S_ISSOCK(mode)) return "a socket";
  return "a device";
}

fs::path directory_of(const fs::path& path) { return path.has_parent_path() ? path.parent_path() : fs::path("."); }

}  // namespace

void require_file(const fs::path& path) {
  struct stat info {};
  if (::stat(path.c_str(), &info) != 0) throw_read_failed(path, errno);
  if (!S_ISREG(info.st_mode))
    throw UserError(fmt::format("{} is {}, not a file", path.string(), kind_of(info.st_mode)), "check the path");
  if (::access(path.c_str(), R_OK) != 0) throw_read_failed(path, errno);
}

std::string read_text(const fs::path& path) {
  Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file.ok()) throw_read_failed(path, errno);
  if (fs::is_directory(path))
    throw UserError(fmt::format("{} is a directory, not a file", path.string()), "check the path");
  std::string text;
  if (struct stat info{}; ::fstat(file.get(), &info) == 0 && S_ISREG(info.st_mode))
    text.reserve(static_cast<size_t>(info.st_size));
  char buffer[1 << 16];
  while (true) {
    const ssize_t count = ::read(file.get(), buffer, sizeof buffer);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) throw_read_failed(path, errno);
    if (count == 0) return text;
    text.append(buffer, static_cast<size_t>(count));
  }
}

void write_atomically(const fs::path& path, std::span<const std::byte> data) {
  const fs::path directory = directory_of(path);
  std::error_code failed;
  fs::create_directories(directory, failed);
  if (failed) throw_write_failed(path, data.size(), failed.value());
  // Not the process id: in containers it repeats, and a crash may have left a file behind.
  static const std::string process = [] {
    std::random_device random;
    return fmt::format("{:08x}{:08x}", random(), random());
  }();
  static std::atomic<uint64_t> count{0};
  const fs::path temporary = directory / fmt::format(".{}.{}{:x}.tmp", path.filename().string(), process, ++count);
  int error = write_new_file(temporary, data);
  if (error == 0 && ::rename(temporary.c_str(), path.c_str()) != 0) error = errno;
  if (error != 0) {
    if (error != EEXIST) ::unlink(temporary.c_str());
    throw_write_failed(path, data.size(), error);
  }
  sync_directory(directory);
}

void write_atomically(const fs::path& path, std::string_view text) {
  write_atomically(path, std::as_bytes(std::span(text)));
}

void refuse_replacing(const fs::path& output, const std::vector<fs::path>& inputs) {
  std::error_code unknown;  // of paths that cannot be looked at: using them will say why
  if (!fs::exists(output, unknown) || (fs::is_directory(output, unknown) && fs::is_empty(output, unknown))) return;
  const fs::path target = fs::canonical(output, unknown);
  for (const auto& input : inputs) {
    if (!fs::exists(input, unknown)) continue;
    const fs::path source = fs::canonical(input, unknown);
    const auto [end, unused] = std::mismatch(source.begin(), source.end(), target.begin(), target.end());
    if (fs::equivalent(output, input, unknown) || (fs::is_directory(source, unknown) && end == source.end()))
      throw UserError(fmt::format("{} would replace an input: {}", output.string(), input.string()),
                      "name another place to write to");
  }
}

void sync_directory(const fs::path& directory) {
  Descriptor handle(::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  // EINVAL: some network file systems cannot sync a directory; the rename itself is then as durable as they make it.
  if (!handle.ok() || (::fsync(handle.get()) != 0 && errno != EINVAL))
    throw IoError(fmt::format("cannot sync directory {}: {}", directory.string(), std::strerror(errno)),
                  hint_for(errno));
}

std::optional<FileLock> FileLock::try_lock(const fs::path& path) {
  std::error_code failed;
  fs::create_directories(directory_of(path), failed);
  if (failed)
    throw IoError(fmt::format("cannot make directory {}: {}", directory_of(path).string(), failed.message()),
                  hint_for(failed.value()));
  const int fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (fd < 0)
    throw IoError(fmt::format("cannot open lock file {}: {}", path.string(), std::strerror(errno)), hint_for(errno));
  FileLock lock(fd);
  // is_held() of another process takes the lock for a moment: only who keeps it holds it.
  constexpr int kTries = 10;
  constexpr useconds_t kPause = 2000;
  for (int tries = 0; ::flock(fd, LOCK_EX | LOCK_NB) != 0;) {
    if (errno == EWOULDBLOCK) {
      if (++tries == kTries) return std::nullopt;
      ::usleep(kPause);
    } else if (errno != EINTR)
      throw IoError(fmt::format("cannot lock {}: {}", path.string(), std::strerror(errno)), hint_for(errno));
  }
  char host[256] = {};
  ::gethostname(host, sizeof host - 1);
  const std::string holder = fmt::format("{} {}\n", ::getpid(), host);
  if (::ftruncate(fd, 0) != 0 || write_all(fd, std::as_bytes(std::span(holder))) != 0)
    throw IoError(fmt::format("cannot write lock file {}: {}", path.string(), std::strerror(errno)), hint_for(errno));
  return lock;
}

bool FileLock::is_held(const fs::path& path) {
  Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  return file.ok() && ::flock(file.get(), LOCK_SH | LOCK_NB) != 0 && errno == EWOULDBLOCK;
}

FileLock::FileLock(FileLock&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}

FileLock::~FileLock() {
  if (fd_ >= 0) ::close(fd_);
}

}  // namespace moraine::core
