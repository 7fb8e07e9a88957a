#include "data/model_tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "core/hash.h"
#include "tests/temporary_directory.h"

namespace moraine::data {
namespace {

using testing::HasSubstr;

class ModelTokenizer : public testing::Test {
 protected:
  std::string refusal(const std::string& tokenizer, int64_t text_vocabulary, int64_t model_vocabulary) const {
    try {
      check_model_tokenizer({"law", tokenizer, text_vocabulary, ""}, "law.h5", folder_.path(), model_vocabulary);
    } catch (const core::UserError& error) {
      EXPECT_FALSE(error.hint().empty());
      return error.what();
    }
    return "accepted";
  }

  TemporaryDirectory folder_;
  const std::string model_ = R"({"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}})";
};

TEST_F(ModelTokenizer, TextOfTheModelsOwnTokenizerIsAccepted) {
  folder_.write("tokenizer.json", model_);
  EXPECT_EQ(refusal("hf:" + core::sha256(model_), 1000, 1024), "accepted");
}

TEST_F(ModelTokenizer, TextOfAnotherTokenizerIsRefusedWithBothNames) {
  folder_.write("tokenizer.json", model_);
  EXPECT_THAT(refusal("bytes-v1", 257, 1024), HasSubstr("'bytes-v1'"));
  EXPECT_THAT(refusal("bytes-v1", 257, 1024), HasSubstr(core::sha256(model_)));
  const std::string other = "hf:" + std::string(64, '0');
  EXPECT_THAT(refusal(other, 1000, 1024), HasSubstr(other));
}

TEST_F(ModelTokenizer, MoreTokensThanTheModelHasAreRefused) {
  EXPECT_THAT(refusal("bytes-v1", 257, 256), HasSubstr("257 token ids"));
}

TEST_F(ModelTokenizer, ADirectoryThatDoesNotSayIsNoReasonToRefuse) {
  EXPECT_EQ(refusal("bytes-v1", 257, 264), "accepted");
  EXPECT_EQ(refusal("bytes-v1", 257, 32000), "accepted");
  folder_.write("tokenizer.json", "{}");
  EXPECT_EQ(refusal("bytes-v1", 257, 264), "accepted");
  folder_.write("tokenizer.json", "no JSON");
  EXPECT_EQ(refusal("hf:" + std::string(64, '0'), 1000, 1024), "accepted");
}

}  // namespace
}  // namespace moraine::data
