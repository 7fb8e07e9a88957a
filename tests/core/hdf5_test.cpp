#include "core/hdf5.h"

#include <csignal>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <thread>

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/error.h"
#include "core/hash.h"
#include "python_peer.h"
#include "tests/temporary_directory.h"

namespace moraine::core {
namespace {

template <typename Call>
std::string user_complaint(const Call& call, const std::filesystem::path& path) {
  try {
    call();
  } catch (const UserError& error) {
    const std::string what = error.what(), prefix = path.string() + ": ";
    return what.rfind(prefix, 0) == 0 ? what.substr(prefix.size()) : what;
  }
  return "accepted";
}

std::vector<int32_t> ramp(size_t size) {
  std::vector<int32_t> values(size);
  std::iota(values.begin(), values.end(), 0);
  return values;
}

TEST(Hdf5, WrittenDatasetsReadBackByRows) {
  const TemporaryDirectory directory;
  const auto path = directory / "new/file.h5";
  const auto values = ramp(3 * 70000);
  Hdf5File out(path, Hdf5File::Mode::kCreate);
  out.write<int32_t>("train/deep/wide", values, {3, 70000});
  out.write<int32_t>("none", {}, {0, 5});
  out.set_attribute("name", std::string("x"));
  out.set_attribute("name", std::string("grüß"));
  out.set_attribute("count", int64_t{-3});
  out.close();

  const Hdf5File in(path, Hdf5File::Mode::kRead);
  EXPECT_TRUE(in.has("train/deep/wide"));
  EXPECT_FALSE(in.has("train/none/wide"));
  EXPECT_EQ(in.shape("train/deep/wide"), (std::vector<int64_t>{3, 70000}));
  EXPECT_EQ(in.read_all<int32_t>("train/deep/wide"), values);
  EXPECT_EQ(in.read<int64_t>("train/deep/wide", 1, 1),
            std::vector<int64_t>(values.begin() + 70000, values.begin() + 140000));
  EXPECT_TRUE(in.read_all<int32_t>("none").empty());
  EXPECT_EQ(in.text_attribute("name"), "grüß");
  EXPECT_EQ(in.int_attribute("count"), -3);
  EXPECT_EQ(in.text_attribute("absent"), std::nullopt);
  const auto datasets = in.datasets();
  ASSERT_EQ(datasets.size(), 2u);
  EXPECT_EQ(datasets[0].name, "none");
  EXPECT_EQ(datasets[1].name, "train/deep/wide");
  EXPECT_EQ(datasets[1].type, "int32");
  EXPECT_EQ(datasets[1].shape, (std::vector<int64_t>{3, 70000}));
  EXPECT_EQ(in.attributes(), (std::map<std::string, std::string>{{"count", "-3"}, {"name", "grüß"}}));
}

TEST(Hdf5, ReadsWhatH5pyWrites) {
  if (const auto reason = PythonPeer::missing("h5py")) GTEST_SKIP() << *reason;
  const TemporaryDirectory directory;
  const auto path = directory / "theirs.h5";
  PythonPeer::run("write-hdf5", path.string());
  const Hdf5File file(path, Hdf5File::Mode::kRead);
  EXPECT_EQ(file.read<int32_t>("train/tokens", 9998, 2), (std::vector<int32_t>{9998, 9999}));
  EXPECT_EQ(file.read<float>("matrix", 1, 2), (std::vector<float>{2, 3, 4, 5}));
  EXPECT_EQ(file.read_all<uint8_t>("big_endian"), (std::vector<uint8_t>{1, 2, 3}));
  EXPECT_EQ(file.read_all<double>("scalar"), (std::vector<double>{2.5}));
  EXPECT_EQ(file.text_attribute("name"), "grüß");
  EXPECT_EQ(file.text_attribute("fixed"), "fixed");
  EXPECT_EQ(file.int_attribute("count"), 42);
  std::map<std::string, std::string> types;
  for (const auto& dataset : file.datasets()) types[dataset.name] = dataset.type;
  EXPECT_EQ(types.at("big_endian"), "int32");
  EXPECT_EQ(types.at("matrix"), "float32");
  EXPECT_EQ(types.at("scalar"), "float64");
  EXPECT_EQ(types.at("words"), "text");
  EXPECT_EQ(file.attributes().at("several"), "...");
  EXPECT_EQ(file.attributes().at("ratio"), "...");

  const auto complaint = [&](const auto& call) { return user_complaint(call, path); };
  EXPECT_EQ(complaint([&] { file.read_all<uint16_t>("train/wide"); }),
            "'train/wide' holds a value that does not fit the type it is read as");
  EXPECT_EQ(complaint([&] { file.read_all<int32_t>("scalar"); }),
            "'scalar' holds a value that does not fit the type it is read as");
  EXPECT_EQ(complaint([&] { file.read_all<int32_t>("words"); }), "'words' does not hold numbers");
  EXPECT_EQ(complaint([&] { file.read_all<int32_t>("train/absent"); }), "no dataset 'train/absent'");
  EXPECT_EQ(complaint([&] { file.read<float>("matrix", 2, 2); }), "'matrix' has 3 rows, asked for 2 from row 2");
  EXPECT_EQ(complaint([&] { file.read<float>("matrix", -1, 1); }), "'matrix' has 3 rows, asked for 1 from row -1");
  EXPECT_EQ(complaint([&] { file.text_attribute("count"); }), "attribute 'count' is not text");
  EXPECT_EQ(complaint([&] { file.int_attribute("ratio"); }), "attribute 'ratio' is not an integer");
  EXPECT_EQ(complaint([&] { file.int_attribute("several"); }), "attribute 'several' does not hold one value");
}

TEST(Hdf5, H5pyReadsWhatWeWrite) {
  if (const auto reason = PythonPeer::missing("h5py")) GTEST_SKIP() << *reason;
  const TemporaryDirectory directory;
  const auto path = directory / "ours.h5";
  Hdf5File file(path, Hdf5File::Mode::kCreate);
  const std::vector<uint8_t> small = {1, 2, 3};
  file.write<int32_t>("a/large", ramp(10000), {10000});
  file.write<uint8_t>("small", small, {3, 1});
  file.set_attribute("name", std::string("german"));
  file.set_attribute("count", int64_t{7});
  file.close();
  EXPECT_EQ(PythonPeer::run("read-hdf5", path.string()),
            "a/large int32 [10000] 49995000.0 gzip\n"
            "small uint8 [3, 1] 6.0 None\n"
            "count int64 7\nname bytes_ b'german'\n");
}

TEST(Hdf5, FilesThatAreNoneAreTheUsersToFix) {
  const TemporaryDirectory directory;
  const auto text = directory.write("text.h5", "plain text");
  EXPECT_EQ(user_complaint([&] { Hdf5File(directory / "none.h5", Hdf5File::Mode::kRead); }, ""),
            "no such file: " + (directory / "none.h5").string());
  EXPECT_EQ(user_complaint([&] { Hdf5File(text, Hdf5File::Mode::kRead); }, text), "is no HDF5 file, but text");
  { Hdf5File(directory / "cut.h5", Hdf5File::Mode::kCreate).write<int32_t>("x", ramp(5000), {5000}); }
  std::filesystem::resize_file(directory / "cut.h5", 1000);
  EXPECT_EQ(user_complaint([&] { Hdf5File(directory / "cut.h5", Hdf5File::Mode::kRead); }, directory / "cut.h5")
                .rfind("cannot be opened: truncated file", 0),
            0U);
}

std::string hint_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.hint();
  }
  return "accepted";
}

TEST(Hdf5, EveryKindOfTroubleHasItsOwnHint) {
  const TemporaryDirectory directory;
  const auto path = directory / "x.h5";
  Hdf5File(path, Hdf5File::Mode::kCreate).write<int32_t>("train/tokens", ramp(2), {2});
  EXPECT_EQ(hint_of([&] { Hdf5File(path, Hdf5File::Mode::kRead).shape("train/token"); }),
            "did you mean 'train/tokens'? Valid: train/tokens");
  std::filesystem::resize_file(path, 1000);
  EXPECT_THAT(hint_of([&] { Hdf5File(path, Hdf5File::Mode::kRead); }), testing::HasSubstr("damaged"));
}

TEST(Hdf5, ALockedFileIsAnIoErrorThatNamesTheRemedy) {
  if (std::getenv("HDF5_USE_FILE_LOCKING") != nullptr)
    GTEST_SKIP() << "HDF5_USE_FILE_LOCKING is set: the library may not lock";
  const TemporaryDirectory directory;
  const auto path = directory / "x.h5";
  Hdf5File(path, Hdf5File::Mode::kCreate).write<int32_t>("x", ramp(2), {2});
  const int held = ::open(path.c_str(), O_RDWR);
  ASSERT_EQ(::flock(held, LOCK_EX), 0);
  try {
    Hdf5File(path, Hdf5File::Mode::kRead);
    ADD_FAILURE() << "opened";
  } catch (const IoError& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr("locked"));
    EXPECT_THAT(error.hint(), testing::HasSubstr("HDF5_USE_FILE_LOCKING=FALSE"));
  }
  ::close(held);
}

TEST(Hdf5, ExtentsThatTheFileCannotHoldAreRefusedBeforeAnythingIsAllocated) {
  if (const auto reason = PythonPeer::missing("h5py")) GTEST_SKIP() << *reason;
  const TemporaryDirectory directory;
  const auto path = directory / "x.h5";
  PythonPeer::run("write-huge-hdf5", path.string());
  const Hdf5File file(path, Hdf5File::Mode::kRead);
  EXPECT_THAT(user_complaint([&] { file.read_all<int64_t>("never_written"); }, path),
              testing::HasSubstr("'never_written' says it has 1000000000000 values, the file holds"));
  EXPECT_THAT(user_complaint([&] { file.shape("overflow"); }, path), testing::HasSubstr("overflows"));
}

TEST(Hdf5, APipeIsRefusedAndNotWaitedFor) {
  const TemporaryDirectory directory;
  ASSERT_EQ(::mkfifo((directory / "pipe").c_str(), 0600), 0);
  EXPECT_THAT(user_complaint([&] { Hdf5File(directory / "pipe", Hdf5File::Mode::kRead); }, ""),
              testing::HasSubstr("is a pipe, not a file"));
}

// A file size limit stands in for a full disk.
void write_past_the_limit(const std::filesystem::path& path) {
  std::signal(SIGXFSZ, SIG_IGN);
  const rlimit limit{1 << 16, 1 << 16};
  ::setrlimit(RLIMIT_FSIZE, &limit);
  try {
    Hdf5File file(path, Hdf5File::Mode::kCreate);
    auto values = ramp(1 << 20);
    for (auto& value : values)
      value = static_cast<int32_t>(crc32c(std::as_bytes(std::span(&value, 1))));  // deflate finds nothing
    file.write<int32_t>("x", values, {1 << 20});
    file.close();
  } catch (const IoError& error) {
    std::fputs(error.what(), stderr);
    std::exit(error.exit_code());
  }
}

TEST(Hdf5, FullDiskIsAnIoErrorAndKeepsTheOldFile) {
  const TemporaryDirectory directory;
  const auto path = directory.write("x.h5", "old");
  EXPECT_EXIT(write_past_the_limit(path), testing::ExitedWithCode(kExitIo),
              "cannot write " + path.string() + " \\([0-9]+ bytes\\): File too large");
  EXPECT_TRUE(read_text(path) == "old");
}

TEST(Hdf5, AnUnfinishedFileNeverAppears) {
  const TemporaryDirectory directory;
  try {
    Hdf5File file(directory / "x.h5", Hdf5File::Mode::kCreate);
    file.write<int32_t>("x", ramp(2), {2});
    throw UserError("stop");
  } catch (const UserError&) {
    EXPECT_FALSE(std::filesystem::exists(directory / "x.h5"));
  }
}

TEST(Hdf5, WritingADatasetTwiceSaysSo) {
  const TemporaryDirectory directory;
  Hdf5File file(directory / "x.h5", Hdf5File::Mode::kCreate);
  file.write<int32_t>("x", ramp(2), {2});
  try {
    file.write<int32_t>("x", ramp(2), {2});
    FAIL() << "accepted";
  } catch (const IoError& error) {
    EXPECT_NE(std::string(error.what()).find("cannot write dataset 'x': "), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("exists"), std::string::npos) << error.what();
  }
}

TEST(Hdf5, ManyThreadsReadOneFile) {
  const TemporaryDirectory directory;
  const auto path = directory / "x.h5";
  Hdf5File(path, Hdf5File::Mode::kCreate).write<int32_t>("x", ramp(50000), {50000});
  const Hdf5File file(path, Hdf5File::Mode::kRead);
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      for (int64_t first = t; first < 50000; first += 1000)
        if (file.read<int32_t>("x", first, 1)[0] != first) ++wrong;
    });
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

}  // namespace
}  // namespace moraine::core
