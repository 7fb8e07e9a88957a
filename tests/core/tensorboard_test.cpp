#include "core/tensorboard.h"

#include <cstring>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "core/error.h"
#include "core/file.h"
#include "tests/temporary_directory.h"

namespace moraine::core::metrics {
namespace {

std::string only_file(const std::filesystem::path& directory) {
  const std::filesystem::directory_iterator entry(directory);
  return read_text(entry->path());
}

// Without the checksum and the time, which differs from run to run: {length, message after its nine bytes of time}.
std::vector<std::string> messages(const std::string& file) {
  std::vector<std::string> out;
  for (size_t at = 0; at < file.size();) {
    uint64_t length = 0;
    std::memcpy(&length, file.data() + at, sizeof length);
    out.push_back(file.substr(at + 12 + 9, length - 9));
    at += 12 + length + 4;
  }
  return out;
}

TEST(TensorBoard, WritesTheBytesOfTheFormat) {
  const TemporaryDirectory directory;
  const auto sink = open_tensorboard(directory.path());
  sink->record({"train/left", "loss", 300, 1.5});
  sink->record({"train/left", "loss", 0, -2});
  const std::string file = only_file(directory / "train/left");
  // Every event file begins like this: 24 bytes follow, and the masked checksum of that number.
  EXPECT_EQ(file.substr(0, 12), std::string("\x18\0\0\0\0\0\0\0\xa3\x7f\x4b\x22", 12));
  const auto found = messages(file);
  ASSERT_EQ(found.size(), 3u);
  EXPECT_EQ(found[0],
            "\x1a\x0d"
            "brain.Event:2");
  // step 300 = varint ac 02; summary 13 bytes, value 11 bytes, tag "loss", simple_value 1.5f = 00 00 c0 3f.
  EXPECT_EQ(found[1], std::string("\x10\xac\x02"
                                  "\x2a\x0d\x0a\x0b\x0a\x04"
                                  "loss"
                                  "\x15\0\0\xc0\x3f",
                                  18));
  EXPECT_EQ(found[2], std::string("\x2a\x0d\x0a\x0b\x0a\x04"
                                  "loss"
                                  "\x15\0\0\0\xc0",
                                  15));
}

TEST(TensorBoard, LabelsStayInsideTheDirectory) {
  const TemporaryDirectory directory;
  const auto sink = open_tensorboard(directory / "board");
  sink->record({"../../a b/c:d", "k", 1, 1});
  sink->record({"/root/x", "k", 1, 1});
  EXPECT_TRUE(std::filesystem::is_directory(directory / "board/_/_/a_b/c_d"));
  EXPECT_TRUE(std::filesystem::is_directory(directory / "board/root/x"));
}

TEST(TensorBoard, AFileInTheWayIsAnIoError) {
  const TemporaryDirectory directory;
  directory.write("board", "a file");
  const auto sink = open_tensorboard(directory / "board");
  EXPECT_THROW(sink->record({"u", "k", 1, 1}), IoError);
}

}  // namespace
}  // namespace moraine::core::metrics
