#include "core/file.h"

#include <csignal>

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "tests/temporary_directory.h"

namespace moraine::core {
namespace {

size_t files_in(const std::filesystem::path& directory) {
  return static_cast<size_t>(
      std::distance(std::filesystem::directory_iterator(directory), std::filesystem::directory_iterator()));
}

TEST(WriteAtomically, ReplacesAFileAndMakesItsDirectories) {
  const TemporaryDirectory directory;
  const auto path = directory / "a/b/file";
  write_atomically(path, "old");
  write_atomically(path, "new text");
  EXPECT_EQ(read_text(path), "new text");
  EXPECT_EQ(files_in(path.parent_path()), 1U) << "a temporary file was left behind";
}

// A file size limit makes write() fail after part of the data, as a full disk does.
void write_past_the_limit(const std::filesystem::path& path) {
  std::signal(SIGXFSZ, SIG_IGN);
  const rlimit limit{1 << 16, 1 << 16};
  ::setrlimit(RLIMIT_FSIZE, &limit);
  try {
    write_atomically(path, std::string(1 << 20, 'x'));
    std::exit(0);
  } catch (const IoError& error) {
    std::fputs(fmt::format("{} | {}", error.what(), error.hint()).c_str(), stderr);
    std::exit(error.exit_code());
  }
}

TEST(WriteAtomically, FailureNamesPathBytesAndReasonAndKeepsTheOldFile) {
  const TemporaryDirectory directory;
  const auto path = directory.write("file", "old");
  EXPECT_EXIT(
      write_past_the_limit(path), testing::ExitedWithCode(kExitIo),
      fmt::format("cannot write {} \\(1048576 bytes\\): File too large \\| raise the file size limit", path.string()));
  EXPECT_EQ(read_text(path), "old");
  EXPECT_EQ(files_in(directory.path()), 1U) << "a temporary file was left behind";
}

TEST(WriteAtomically, ParentThatIsAFileIsReported) {
  const TemporaryDirectory directory;
  directory.write("plain", "");
  EXPECT_THROW(read_text(directory.path()), UserError) << "a directory where a file belongs is the caller's slip";
  EXPECT_THROW(write_atomically(directory / "plain/file", "x"), IoError);
}

TEST(FileLock, ExcludesASecondHolderUntilReleased) {
  const TemporaryDirectory directory;
  const auto path = directory / "run/lock";
  {
    const auto first = FileLock::try_lock(path);
    ASSERT_TRUE(first);
    EXPECT_FALSE(FileLock::try_lock(path));
    EXPECT_THAT(read_text(path), testing::StartsWith(fmt::format("{} ", ::getpid())));
  }
  EXPECT_TRUE(FileLock::try_lock(path));
}

TEST(FileLock, IsReleasedWhenItsProcessDies) {
  const TemporaryDirectory directory;
  const auto path = directory / "lock";
  const pid_t child = ::fork();
  if (child == 0) {
    const auto lock = FileLock::try_lock(path);
    ::raise(SIGKILL);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFSIGNALED(status));
  EXPECT_TRUE(FileLock::try_lock(path));
}

}  // namespace
}  // namespace moraine::core
