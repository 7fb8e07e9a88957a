#include "core/checksums.h"

#include <functional>
#include <span>
#include <string>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "core/hash.h"
#include "core/safetensors.h"
#include "tests/temporary_directory.h"

namespace moraine::core {
namespace {

using testing::HasSubstr;

std::span<const std::byte> bytes_of(const std::string& text) { return std::as_bytes(std::span(text)); }

std::string refusal(const std::function<void()>& call) {
  try {
    call();
  } catch (const UserError& error) {
    EXPECT_FALSE(error.hint().empty());
    return error.what();
  }
  return "accepted";
}

TEST(Checksums, AreReadBackAsWritten) {
  const TemporaryDirectory directory;
  EXPECT_TRUE(read_checksums(directory.path()).empty());
  const Checksums sums = {{"a b.txt", sha256("one")}, {"c", sha256("two")}};
  write_checksums(directory.path(), sums);
  EXPECT_EQ(read_checksums(directory.path()), sums);
  EXPECT_EQ(read_text(directory / "SHA256SUMS"), sha256("one") + "  a b.txt\n" + sha256("two") + "  c\n");
}

TEST(Checksums, AChangedByteIsNamedWithBothHashes) {
  const TemporaryDirectory directory;
  write_checksums(directory.path(), {{"x", sha256("right")}});
  check_checksum(directory / "x", bytes_of("right"));
  check_checksum(directory / "unlisted", bytes_of("anything"));
  const std::string message = refusal([&] { check_checksum(directory / "x", bytes_of("wrong")); });
  EXPECT_THAT(message, HasSubstr(sha256("right")));
  EXPECT_THAT(message, HasSubstr(sha256("wrong")));
}

TEST(Checksums, DamagedAndMissingFilesAreListed) {
  const TemporaryDirectory directory;
  directory.write("good", "one");
  directory.write("bad", "two!");
  write_checksums(directory.path(), {{"bad", sha256("two")}, {"good", sha256("one")}, {"lost", sha256("three")}});
  EXPECT_EQ(damaged_files(directory.path()), (Checksums{{"bad", sha256("two!")}, {"lost", "missing"}}));
}

TEST(Checksums, MalformedLinesAndPathsAreRefused) {
  const TemporaryDirectory directory;
  directory.write("SHA256SUMS", "not a sum\n");
  EXPECT_THAT(refusal([&] { read_checksums(directory.path()); }), HasSubstr("not a line of sha256sum"));
  directory.write("SHA256SUMS", sha256("x") + "  ..\n");
  EXPECT_THAT(refusal([&] { read_checksums(directory.path()); }), HasSubstr("cannot be a file name"));
}

TEST(Checksums, WeightsOfADirectoryAreComparedWhenOpened) {
  const TemporaryDirectory directory;
  const float one = 1, two = 2;
  const auto file = [](const float& value) {
    const TensorView view{"x", DType::kF32, {1}, std::as_bytes(std::span(&value, 1))};
    return serialize_safetensors(std::span(&view, 1), {});
  };
  write_atomically(directory / "model.safetensors", file(one));
  write_checksums(directory.path(), {{"model.safetensors", sha256(file(one))}});
  EXPECT_EQ(ShardedSafetensors::open(directory.path()).tensors().size(), 1U);
  write_atomically(directory / "model.safetensors", file(two));
  EXPECT_THAT(refusal([&] { ShardedSafetensors::open(directory.path()); }), HasSubstr("damaged or changed"));
}

}  // namespace
}  // namespace moraine::core
