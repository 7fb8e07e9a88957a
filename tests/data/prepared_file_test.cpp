#include <cstdlib>

#include <sys/wait.h>

#include <gtest/gtest.h>

#include "core/error.h"
#include "core/json.h"
#include "data/text_dataset.h"
#include "tests/temporary_directory.h"

namespace moraine::data {
namespace {

// Files that scripts/prepare_text.py made, against an expectation that Python computed from the documented rules.
class PreparedFile : public testing::Test {
 protected:
  void SetUp() override {
    const std::string command = fmt::format("'{}' '{}/tests/data/text_fixtures.py' '{}'", MORAINE_PYTHON,
                                            MORAINE_SOURCE_DIR, (folder_ / "").string());
    const int status = std::system(command.c_str());
    if (WIFEXITED(status) && WEXITSTATUS(status) == 77)
      GTEST_SKIP() << "Python packages h5py, numpy or tokenizers are missing: run scripts/setup";
    ASSERT_EQ(status, 0) << command;
    expected_ = core::read_json(folder_ / "expected.json");
  }

  TemporaryDirectory folder_;
  core::Json expected_;
};

TEST_F(PreparedFile, HoldsTheDocumentedTokensAndBytes) {
  for (const std::string name : {"bytes", "hf"}) {
    for (const auto& [split, content] : expected_.at(name).at("splits").items()) {
      const auto tokens = content.at("tokens").get<std::vector<int64_t>>();
      const auto whole = static_cast<int64_t>(tokens.size()) - 1;  // one sequence over the whole split
      const auto dataset =
          TextDataset::open(folder_ / (name + ".h5"), split, whole, expected_.at(name).at("tokenizer"));
      EXPECT_EQ(dataset.info().name, name);
      EXPECT_EQ(dataset.eval_batch(0, 1), tokens) << name << " " << split;

      const auto sequences = TextDataset::open(folder_ / (name + ".h5"), split, 50);
      int64_t bytes = 0;
      for (int64_t i = 0; i < sequences.num_eval_sequences(); ++i) bytes += sequences.eval_bytes(i, 1);
      EXPECT_EQ(bytes, dataset.num_bytes()) << name << " " << split;
      // All but the first token's bytes are predicted; the fixtures' texts start with an ASCII word of at most 12
      // bytes.
      const int64_t all = content.at("bytes");
      if (name == "bytes") {
        EXPECT_EQ(bytes, all - 1) << split;
      }
      EXPECT_TRUE(bytes < all && bytes >= all - 12) << name << " " << split << ": " << bytes << " of " << all;
    }
  }
}

TEST_F(PreparedFile, IsRefusedUnderAnotherTokenizer) {
  EXPECT_THROW(TextDataset::open(folder_ / "hf.h5", "train", 16, ByteTokenizer::kName), core::UserError);
  EXPECT_THROW(TextDataset::open(folder_ / "bytes.h5", "train", 16, expected_.at("hf").at("tokenizer")),
               core::UserError);
}

}  // namespace
}  // namespace moraine::data
