#include "coordinator/journal.h"

#include <gtest/gtest.h>

#include <sys/resource.h>

#include <csignal>
#include <cstring>
#include <fstream>

#include "core/error.h"
#include "core/file.h"
#include "core/hash.h"
#include "toy.h"

namespace moraine::coordinator {
namespace {

constexpr size_t kHeader = 52;

class JournalTest : public testing::Test {
 protected:
  /// Writes records and returns the file after each of them; [0] is the empty file.
  std::vector<std::string> write_journal(int records) {
    std::vector<std::string> states = {""};
    Journal journal(path_);
    for (int i = 0; i < records; ++i) {
      journal.append(i == 0 ? RecordType::kEpoch : RecordType::kAccept,
                     {{"unit", std::string(static_cast<size_t>(i) + 1, 'u')}});
      states.push_back(core::read_text(path_));
    }
    return states;
  }

  void put(const std::string& bytes) { std::ofstream(path_, std::ios::binary | std::ios::trunc) << bytes; }

  TemporaryDirectory directory_;
  std::filesystem::path path_ = directory_.path() / "journal.log";
};

TEST_F(JournalTest, GivesBackWhatWasAppended) {
  write_journal(3);
  { Journal(path_).append(RecordType::kDone, {{"time", 1.5}}); }
  const Journal journal(path_);
  ASSERT_EQ(journal.records().size(), 4u);
  EXPECT_EQ(journal.records()[0].type, RecordType::kEpoch);
  EXPECT_EQ(journal.records()[2].body.at("unit"), "uuu");
  EXPECT_EQ(journal.records()[3].lsn, 4u);
  EXPECT_EQ(journal.records()[3].type, RecordType::kDone);
  EXPECT_EQ(read_journal(path_).size(), 4u);
  EXPECT_TRUE(read_journal(directory_.path() / "none").empty());
}

TEST_F(JournalTest, HasTheDocumentedLayout) {
  const auto states = write_journal(2);
  const std::string first = states[1], second = states[2].substr(first.size());
  const auto number = [&](size_t at, size_t bytes) {
    uint64_t value = 0;
    std::memcpy(&value, second.data() + at, bytes);
    return value;
  };
  EXPECT_EQ(number(0, 4), second.size() - kHeader);
  EXPECT_EQ(number(4, 4), core::crc32c(std::as_bytes(std::span(second)).subspan(8)));
  EXPECT_EQ(number(8, 8), 2u);
  EXPECT_EQ(number(16, 2), static_cast<uint64_t>(RecordType::kAccept));
  EXPECT_EQ(number(18, 2), 1u);
  std::string previous;
  for (size_t i = 0; i < 32; ++i) previous += fmt::format("{:02x}", static_cast<uint8_t>(second[20 + i]));
  EXPECT_EQ(previous, core::sha256(first));
  EXPECT_EQ(second.substr(kHeader), R"({"unit":"uu"})");
}

TEST_F(JournalTest, EveryBytePrefixIsAValidOlderState) {
  const auto states = write_journal(4);
  const std::string& whole = states.back();
  for (size_t bytes = 0; bytes <= whole.size(); ++bytes) {
    size_t complete = 0;
    while (complete + 1 < states.size() && states[complete + 1].size() <= bytes) ++complete;
    put(whole.substr(0, bytes));
    ASSERT_EQ(read_journal(path_).size(), complete) << "reader at byte " << bytes;
    ASSERT_EQ(std::filesystem::file_size(path_), bytes) << "a reader must not change the file";
    Journal journal(path_);
    ASSERT_EQ(journal.records().size(), complete) << "writer at byte " << bytes;
    journal.append(RecordType::kAccept, {{"unit", "next"}});
    const auto records = read_journal(path_);
    ASSERT_EQ(records.size(), complete + 1);
    ASSERT_EQ(records.back().body.at("unit"), "next");
  }
}

TEST_F(JournalTest, RefusesEveryFlippedBitBeforeTheLastRecordAndNamesOffsets) {
  const auto states = write_journal(4);
  const std::string& whole = states.back();
  const size_t last_record = states[states.size() - 2].size();
  for (size_t bit = 0; bit < 8 * last_record; ++bit) {
    std::string damaged = whole;
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << bit % 8));
    put(damaged);
    try {
      const Journal journal(path_);
      FAIL() << "bit " << bit % 8 << " of byte " << bit / 8 << " went unnoticed";
    } catch (const core::IoError& error) {
      ASSERT_NE(std::string(error.what()).find("byte "), std::string::npos) << error.what();
      ASSERT_FALSE(error.hint().empty());
    }
    ASSERT_EQ(core::read_text(path_), damaged) << "a refused journal must be left as it is";
  }
}

TEST_F(JournalTest, CutsALastRecordWithAFlippedBitAsTorn) {
  const auto states = write_journal(3);
  std::string damaged = states.back();
  damaged.back() = static_cast<char>(damaged.back() ^ 1);
  put(damaged);
  EXPECT_EQ(Journal(path_).records().size(), 2u);
  EXPECT_EQ(core::read_text(path_), states[2]);
}

TEST_F(JournalTest, RefusesRecordsThatWereDroppedOrReordered) {
  const auto states = write_journal(4);
  const auto record = [&](size_t i) { return states[i].substr(states[i - 1].size()); };
  for (const std::string& forged : {record(1) + record(3) + record(4), record(1) + record(3) + record(2),
                                    record(2) + record(3), record(1) + record(1) + record(2)}) {
    put(forged);
    EXPECT_THROW(Journal{path_}, core::IoError);
  }
}

TEST_F(JournalTest, CutsZerosThatAFileSystemLeftBehind) {
  const auto states = write_journal(2);
  put(states.back() + std::string(4096, '\0'));
  EXPECT_EQ(Journal(path_).records().size(), 2u);
  EXPECT_EQ(core::read_text(path_), states.back());
}

TEST_F(JournalTest, TakesTextsThatAreNotUtf8) {
  { Journal(path_).append(RecordType::kFail, {{"text", "broken \xff name"}}); }
  EXPECT_NE(read_journal(path_).at(0).body.at("text").get<std::string>().find("broken"), std::string::npos);
}

TEST_F(JournalTest, ReportsAFullDiskAndKeepsWhatWasThere) {
  const auto states = write_journal(2);
  Journal journal(path_);
  rlimit before{};
  getrlimit(RLIMIT_FSIZE, &before);
  const auto old_handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit limit{states.back().size() + 10, before.rlim_max};  // room for a part of the record
  setrlimit(RLIMIT_FSIZE, &limit);
  EXPECT_THROW(journal.append(RecordType::kDone, {}), core::IoError);
  setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, old_handler);
  EXPECT_THROW(journal.append(RecordType::kDone, {}), core::IoError)
      << "a journal that lost a write must take nothing more";
  EXPECT_EQ(Journal(path_).records().size(), 2u);
}

}  // namespace
}  // namespace moraine::coordinator
