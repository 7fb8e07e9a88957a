#include "core/safetensors.h"

#include <cstring>

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include "core/error.h"
#include "core/hash.h"
#include "python_peer.h"
#include "tests/temporary_directory.h"

namespace moraine::core {
namespace {

template <typename T>
TensorView view(const std::string& name, DType dtype, std::vector<int64_t> shape, const std::vector<T>& data) {
  return {.name = name, .dtype = dtype, .shape = std::move(shape), .data = std::as_bytes(std::span(data))};
}

// A file with a hand-written header.
std::string file_text(const std::string& header, size_t data_bytes) {
  const uint64_t length = header.size();
  std::string text(8, '\0');
  std::memcpy(text.data(), &length, 8);
  return text + header + std::string(data_bytes, 'd');
}

std::string complaint_about(const std::string& text) {
  const auto bytes = std::as_bytes(std::span(text));
  try {
    Safetensors::parse(Bytes(std::vector<std::byte>(bytes.begin(), bytes.end())), "f");
  } catch (const UserError& error) {
    return error.what();
  }
  return "accepted";
}

std::string tensor(const std::string& name, const std::string& dtype, const std::string& shape, int64_t begin,
                   int64_t end) {
  return fmt::format(R"("{}":{{"dtype":"{}","shape":{},"data_offsets":[{},{}]}})", name, dtype, shape, begin, end);
}

const std::vector<float> kRamp = {0, 1, 2, 3, 4, 5};
const std::vector<int64_t> kIds = {-1, int64_t{1} << 40};
const std::vector<uint8_t> kOdd = {1, 2, 3};

TEST(Safetensors, SerialisedTensorsReadBack) {
  const std::vector<TensorView> tensors = {view("z", DType::kF32, {2, 3}, kRamp), view("a", DType::kU8, {3}, kOdd),
                                           view("m", DType::kI64, {2}, kIds)};
  const auto file = Safetensors::parse(Bytes(serialize_safetensors(tensors, {{"k", "v"}})), "memory");
  ASSERT_EQ(file.tensors().size(), 3U);
  EXPECT_EQ(file.tensors()[0].name, "a");
  EXPECT_EQ(file.find("none"), nullptr);
  EXPECT_EQ(file.metadata(), (std::map<std::string, std::string>{{"k", "v"}}));
  for (const auto& expected : tensors) {
    const auto* found = file.find(expected.name);
    ASSERT_NE(found, nullptr) << expected.name;
    EXPECT_EQ(found->dtype, expected.dtype);
    EXPECT_EQ(found->shape, expected.shape);
    EXPECT_TRUE(std::ranges::equal(found->data, expected.data)) << expected.name;
    const auto offset = static_cast<size_t>(found->data.data() - file.bytes().span().data());
    EXPECT_EQ(offset % size_of(found->dtype), 0U) << expected.name << " is not aligned";
  }
}

TEST(Safetensors, EqualTensorsGiveEqualBytesInAnyOrder) {
  std::vector<TensorView> tensors = {view("z", DType::kF32, {6}, kRamp), view("a", DType::kU8, {3}, kOdd),
                                     view("m", DType::kI64, {2}, kIds)};
  const auto first = serialize_safetensors(tensors, {});
  std::swap(tensors[0], tensors[2]);
  EXPECT_EQ(serialize_safetensors(tensors, {}), first);
}

TEST(Safetensors, SerialiserRefusesOurOwnMistakes) {
  const std::vector<TensorView> twice = {view("a", DType::kU8, {3}, kOdd), view("a", DType::kU8, {3}, kOdd)};
  const std::vector<TensorView> wrong_size = {view("a", DType::kF32, {3}, kOdd)};
  EXPECT_THROW(serialize_safetensors(twice, {}), InternalError);
  EXPECT_THROW(serialize_safetensors(wrong_size, {}), InternalError);
}

TEST(Safetensors, MalformedFilesAreNamedPrecisely) {
  const std::string good = "{" + tensor("a", "F32", "[2]", 0, 8) + "," + tensor("b", "U8", "[3]", 8, 11) + "}";
  EXPECT_EQ(complaint_about(file_text(good, 11)), "accepted");
  EXPECT_EQ(complaint_about(file_text(good + "   ", 11)), "accepted") << "padding";
  EXPECT_EQ(complaint_about(std::string(4, '\0')), "f: truncated: expected at least 8 bytes, the file has 4");
  EXPECT_EQ(complaint_about(file_text(good, 11).substr(0, 50)),
            fmt::format("f: truncated: expected {} bytes of header, the file has 42", good.size()));
  EXPECT_EQ(complaint_about(file_text(good, 9)),
            "f: truncated: tensor 'b' ends at byte 11 of the data, the file has 9");
  EXPECT_EQ(complaint_about(file_text(good, 15)), "f: 4 bytes after the last tensor");
  EXPECT_EQ(complaint_about(std::string(8, '\x7f')),
            "f: header length 9187201950435737471 is above the limit of 100000000 bytes");
  EXPECT_EQ(complaint_about(file_text("[]", 0)), "f: the header does not start with '{'");
  EXPECT_EQ(complaint_about(file_text("{\"a\":", 0)).rfind("f: header:1:", 0), 0U);
}

TEST(Safetensors, BadEntriesAreNamedPrecisely) {
  const auto with = [](const std::string& entries, size_t bytes) {
    return complaint_about(file_text("{" + entries + "}", bytes));
  };
  EXPECT_EQ(with(tensor("a", "F32", "[2]", 0, 8) + "," + tensor("b", "F32", "[2]", 4, 12), 12),
            "f: tensor 'b' starts at byte 4 of the data, expected 8 (tensors overlap)");
  EXPECT_EQ(with(tensor("a", "U8", "[2]", 0, 2) + "," + tensor("b", "U8", "[1]", 3, 4), 4),
            "f: tensor 'b' starts at byte 3 of the data, expected 2 (a gap that no tensor covers)");
  EXPECT_EQ(with(tensor("a", "F32", "[3]", 0, 8), 8),
            "f: tensor 'a': F32 [3] needs 12 bytes, data_offsets [0,8] hold 8");
  EXPECT_EQ(with(tensor("a", "F32", "[1]", 8, 4), 8),
            "f: tensor 'a': F32 [1] needs 4 bytes, data_offsets [8,4] hold -4");
  EXPECT_EQ(with(tensor("a", "F99", "[1]", 0, 4), 4), "f: tensor 'a': unknown dtype \"F99\"");
  EXPECT_EQ(with(tensor("a", "U8", "[-1]", 0, 1), 1),
            "f: tensor 'a': sides of the shape must be non-negative integers, found -1");
  EXPECT_EQ(with(tensor("a", "F64", "[4294967296,4294967296]", 0, 0), 0),
            "f: tensor 'a': the number of bytes of shape [4294967296,4294967296] overflows");
  EXPECT_EQ(with(tensor("a", "U8", "[1]", 0, 1) + "," + tensor("a", "U8", "[1]", 1, 2), 2),
            "f: header: key 'a' stands twice in one object");
  EXPECT_EQ(with(R"("a":{"dtype":"U8","shape":[1]})", 1),
            "f: tensor 'a': expected exactly dtype, shape and data_offsets");
  EXPECT_EQ(with(R"("__metadata__":{"k":1})", 0), "f: __metadata__: 'k' is not text");
}

TEST(Safetensors, EmptyTensorsAndEmptyFilesAreLegal) {
  EXPECT_EQ(complaint_about(
                file_text("{" + tensor("a", "F32", "[0,4]", 0, 0) + "," + tensor("b", "U8", "[]", 0, 1) + "}", 1)),
            "accepted");
  EXPECT_EQ(complaint_about(file_text("{}", 0)), "accepted");
}

TEST(Safetensors, FilesOfOtherFormatsAreCalledByTheirName) {
  EXPECT_EQ(complaint_about(""), "f: no safetensors file, but an empty file");
  EXPECT_EQ(complaint_about("no header at all"), "f: no safetensors file, but text");
  EXPECT_EQ(complaint_about("{}"), "f: no safetensors file, but text");
  EXPECT_EQ(complaint_about(std::string("PK\x03\x04") + std::string(60, '\0')),
            "f: no safetensors file, but a zip archive (PyTorch's .bin and .pt, NumPy's .npz)");
  EXPECT_EQ(complaint_about(std::string("\x80\x02\x8a\x0a") + std::string(60, '\xf9')),
            "f: no safetensors file, but a Python pickle (PyTorch's .bin and .pt)");
  // A header of 0x280 bytes begins with the bytes of a pickle and is none.
  EXPECT_EQ(complaint_about(file_text("{}" + std::string(0x280 - 2, ' '), 0)), "accepted");
}

TEST(Safetensors, APipeOrADirectoryIsRefusedAndNotWaitedFor) {
  const TemporaryDirectory directory;
  ASSERT_EQ(::mkfifo((directory / "pipe").c_str(), 0600), 0);
  for (const auto& path : {directory / "pipe", directory.path()})
    EXPECT_THROW(Bytes::map_file(path), UserError) << path;
}

TEST(Safetensors, ReferenceLibraryReadsOurFile) {
  if (const auto reason = PythonPeer::missing("safetensors")) GTEST_SKIP() << *reason;
  const TemporaryDirectory directory;
  const std::vector<uint8_t> flags = {1, 0, 1};
  const std::vector<TensorView> tensors = {
      view("a", DType::kBool, {3}, flags), view("e", DType::kBF16, {0, 2}, std::vector<uint16_t>{}),
      view("m.\"q\"", DType::kI64, {2}, kIds), view("z", DType::kF32, {2, 3}, kRamp)};
  const auto bytes = serialize_safetensors(tensors, {{"format", "pt"}, {"moraine", "{\"kind\":\"x\"}"}});
  write_atomically(directory / "ours", bytes);
  const auto line = [&](size_t i, const std::string& rest) {
    return fmt::format("{} {} {}\n", tensors[i].name, rest, sha256(tensors[i].data));
  };
  EXPECT_EQ(PythonPeer::run("read-safetensors", (directory / "ours").string()),
            line(0, "BOOL [3]") + line(1, "BF16 [0, 2]") + line(2, "I64 [2]") + line(3, "F32 [2, 3]") +
                "{\"format\": \"pt\", \"moraine\": \"{\\\"kind\\\":\\\"x\\\"}\"}\n");
}

TEST(Safetensors, ReadsTheReferenceLibrarysFile) {
  if (const auto reason = PythonPeer::missing("safetensors")) GTEST_SKIP() << *reason;
  const TemporaryDirectory directory;
  PythonPeer::run("write-safetensors", (directory / "theirs").string());
  const auto file = Safetensors::open(directory / "theirs");
  const auto expect = [&](const std::string& name, DType dtype, const std::vector<int64_t>& shape,
                          std::span<const std::byte> data) {
    const auto* found = file.find(name);
    ASSERT_NE(found, nullptr) << name;
    EXPECT_EQ(found->dtype, dtype) << name;
    EXPECT_EQ(found->shape, shape) << name;
    EXPECT_TRUE(std::ranges::equal(found->data, data)) << name;
  };
  const std::vector<uint16_t> half = {0x3800, 0xC000}, brain = {0x3F80, 0xC040};
  const std::vector<uint8_t> flags = {1, 0, 1};
  const std::vector<int32_t> scalar = {7};
  expect("ramp", DType::kF32, {2, 3}, std::as_bytes(std::span(kRamp)));
  expect("ids", DType::kI64, {2}, std::as_bytes(std::span(kIds)));
  expect("half", DType::kF16, {2}, std::as_bytes(std::span(half)));
  expect("brain", DType::kBF16, {2}, std::as_bytes(std::span(brain)));
  expect("flags", DType::kBool, {3}, std::as_bytes(std::span(flags)));
  expect("empty", DType::kF64, {0, 4}, {});
  expect("scalar", DType::kI32, {}, std::as_bytes(std::span(scalar)));
  EXPECT_EQ(file.tensors().size(), 7U);
  EXPECT_EQ(file.metadata().at("note"), "grüß");
}

class ShardedTest : public testing::Test {
 protected:
  void write_shard(const std::string& file, const std::vector<std::string>& names) {
    std::vector<TensorView> tensors;
    for (const auto& name : names) tensors.push_back(view(name, DType::kU8, {3}, kOdd));
    write_atomically(directory_ / file, serialize_safetensors(tensors, {}));
  }
  std::string open_with_index(const std::string& weight_map) {
    directory_.write("model.safetensors.index.json", R"({"metadata":{},"weight_map":)" + weight_map + "}");
    try {
      const auto model = ShardedSafetensors::open(directory_.path());
      std::string names;
      for (const auto& tensor : model.tensors()) names += tensor.name + " ";
      return names;
    } catch (const UserError& error) {
      const std::string what = error.what(), prefix = directory_.path().string();
      return what.substr(what.rfind(prefix, 0) == 0 ? prefix.size() : 0);
    }
  }
  TemporaryDirectory directory_;
};

TEST_F(ShardedTest, ReadsAllShardsOfTheIndex) {
  write_shard("s1", {"b", "d"});
  write_shard("s2", {"a", "c"});
  EXPECT_EQ(open_with_index(R"({"b":"s1","d":"s1","a":"s2","c":"s2"})"), "a b c d ");
}

TEST_F(ShardedTest, RefusesAnIndexThatDisagreesWithItsShards) {
  write_shard("s1", {"a", "b"});
  write_shard("s2", {"b", "c"});
  EXPECT_EQ(open_with_index(R"({"a":"s1","b":"s1","c":"s3"})"), ": shard s3 is missing");
  EXPECT_EQ(open_with_index(R"({"a":"s1","b":"s1","c":"s1"})"),
            "/s1: tensor 'c' is not there, although the index says so");
  EXPECT_EQ(open_with_index(R"({"a":"s1","b":"s1","c":"s2"})"),
            "/s2: tensor 'b' is not listed for this shard in the index");
  EXPECT_EQ(open_with_index(R"({"a":"../s1"})"),
            "/model.safetensors.index.json: the name of a shard cannot be a file name: \"../s1\"");
  EXPECT_EQ(open_with_index("{}"), "/model.safetensors.index.json: no weight_map in the index");
}

TEST_F(ShardedTest, RefusesADirectoryWithoutWeights) {
  EXPECT_THROW(ShardedSafetensors::open(directory_.path()), UserError);
  write_shard("model.safetensors", {"only"});
  EXPECT_EQ(ShardedSafetensors::open(directory_.path()).tensors().size(), 1U);
}

}  // namespace
}  // namespace moraine::core
