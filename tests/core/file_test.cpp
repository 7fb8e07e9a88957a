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

TEST(RefuseReplacing, KnowsAnInputByAnyOfItsNames) {
  const TemporaryDirectory directory;
  namespace fs = std::filesystem;
  const auto input = directory.write("in/model.safetensors", "weights");
  fs::create_symlink(input, directory / "link");
  fs::create_hard_link(input, directory / "twin");
  fs::create_directory_symlink(directory / "in", directory / "other");
  for (const auto& output : {input, directory / "in/../in/model.safetensors", directory / "link", directory / "twin",
                             directory / "other/model.safetensors"})
    EXPECT_THROW(refuse_replacing(output, {input}), UserError) << output;
  EXPECT_THROW(refuse_replacing(input, {directory / "in"}), UserError) << "a file of a directory that is an input";
  EXPECT_THROW(refuse_replacing(directory / "other", {directory / "in"}), UserError);
  fs::create_directory(directory / "in/empty");
  for (const auto& output : {directory / "in/new", directory / "in/empty", directory / "inside"})
    EXPECT_NO_THROW(refuse_replacing(output, {directory / "in", "", directory / "absent"})) << output;
  directory.write("inside", "beside a directory whose name it begins with");
  EXPECT_NO_THROW(refuse_replacing(directory / "inside", {directory / "in"}));
}

TEST(FileLock, SaysWhetherSomebodyHoldsIt) {
  const TemporaryDirectory directory;
  EXPECT_FALSE(FileLock::is_held(directory / "lock"));
  EXPECT_FALSE(std::filesystem::exists(directory / "lock")) << "asking made a file";
  {
    const auto lock = FileLock::try_lock(directory / "lock");
    ASSERT_TRUE(lock);
    EXPECT_TRUE(FileLock::is_held(directory / "lock"));
  }
  EXPECT_FALSE(FileLock::is_held(directory / "lock"));
}

TEST(FileLock, NamesTheDirectoryThatCannotBeMade) {
  const TemporaryDirectory directory;
  directory.write("file", "no directory");
  try {
    FileLock::try_lock(directory / "file/run/lock");
    FAIL() << "locked below a file";
  } catch (const IoError& error) {
    EXPECT_THAT(error.what(), testing::AllOf(testing::HasSubstr("cannot make directory"),
                                             testing::HasSubstr("file/run"), testing::HasSubstr("Not a directory")));
  }
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
