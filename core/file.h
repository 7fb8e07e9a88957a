#pragma once

#include <cstddef>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace moraine::core {

/// Looks at a path before it is opened, so that nothing waits for a pipe or reads a device. Throws UserError if there
/// is nothing, or no regular file (symbolic links are followed); IoError naming the system's reason if it cannot be
/// looked at or may not be read.
void require_file(const std::filesystem::path& path);

/// Reads a whole text file. Throws UserError (missing, a directory) or IoError.
std::string read_text(const std::filesystem::path& path);

/// Writes so that a reader sees the old file or the whole new one, also after a crash: temporary file in the same
/// directory, fdatasync, rename, sync of the directory. Creates parent directories. On failure (disk full, read-only)
/// throws IoError naming path, bytes and reason, and leaves no temporary file behind.
void write_atomically(const std::filesystem::path& path, std::span<const std::byte> data);
void write_atomically(const std::filesystem::path& path, std::string_view text);

/// For commands that replace what is there: throws UserError if `output` is one of the inputs, also by way of symbolic
/// or hard links, or lies inside a directory among them. Outputs that do not exist yet, and empty directories, replace
/// nothing.
void refuse_replacing(const std::filesystem::path& output, const std::vector<std::filesystem::path>& inputs);

/// fsync of a directory, so that renames in it survive a crash.
void sync_directory(const std::filesystem::path& directory);

/// An exclusive flock on a file; released when destroyed or when the process dies.
class FileLock {
 public:
  /// nullopt when another process holds it. The holder's "pid host" is left in the file for messages.
  static std::optional<FileLock> try_lock(const std::filesystem::path& path);
  /// Whether some process holds it now. Needs no right to write; creates nothing.
  static bool is_held(const std::filesystem::path& path);
  FileLock(FileLock&& other) noexcept;
  FileLock& operator=(FileLock&&) = delete;
  ~FileLock();

 private:
  explicit FileLock(int fd) : fd_(fd) {}
  int fd_;
};

}  // namespace moraine::core
