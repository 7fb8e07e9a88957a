#include "data/bpe_tokenizer.h"

#include <fstream>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "core/utf8.h"
#include "data/byte_tokenizer.h"
#include "data/model_tokenizer.h"
#include "tests/temporary_directory.h"

namespace moraine::data {
namespace {

namespace fs = std::filesystem;
using core::Json;
using testing::AllOf;
using testing::HasSubstr;

const fs::path kGolden = fs::path(MORAINE_SOURCE_DIR) / "tests/data/golden";
using Ids = std::vector<int64_t>;

std::vector<std::string> variants() {
  std::vector<std::string> names = {"gpt2", "smollm2", "llama3", "qwen2"};
  if (std::getenv("MORAINE_TEST_TOKENIZER") != nullptr) names.emplace_back("given");
  return names;
}

/// What scripts/make_tokenizer_golden.py wrote. MORAINE_TEST_TOKENIZER and MORAINE_TEST_TOKENIZER_STRINGS name another
/// file and that script's output for it.
class GoldenStrings : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    const bool own = GetParam() != "given";
    const Json golden =
        core::read_json(own ? kGolden / "strings.json" : fs::path(std::getenv("MORAINE_TEST_TOKENIZER_STRINGS")));
    strings_ = golden.at("strings").get<std::vector<std::string>>();
    expected_ = golden.at("variants").at(GetParam());
    tokenizer_ = std::make_unique<BpeTokenizer>(BpeTokenizer::from_file(
        own ? kGolden / (GetParam() + ".json") : fs::path(std::getenv("MORAINE_TEST_TOKENIZER"))));
  }
  // Strings with bytes that the vocabulary lacks are refused by us and lose them in `tokenizers`.
  std::optional<Ids> encode(const std::string& text, SpecialTokens special) const {
    try {
      return tokenizer_->encode(text, special);
    } catch (const core::UserError& error) {
      EXPECT_THAT(error.what(), HasSubstr("no token for the byte"));
      EXPECT_EQ(GetParam(), "given");
      return std::nullopt;
    }
  }

  std::vector<std::string> strings_;
  Json expected_;
  std::unique_ptr<BpeTokenizer> tokenizer_;
};
INSTANTIATE_TEST_SUITE_P(BpeTokenizer, GoldenStrings, testing::ValuesIn(variants()),
                         [](const auto& test) { return test.param; });

TEST_P(GoldenStrings, HaveTheIdsOfHuggingFace) {
  ASSERT_GE(strings_.size(), 200u);
  for (size_t i = 0; i < strings_.size(); ++i) {
    SCOPED_TRACE(Json(strings_[i]).dump(-1, ' ', true));
    const auto ids = encode(strings_[i], SpecialTokens::kRecognised), text = encode(strings_[i], SpecialTokens::kText);
    if (ids) {
      EXPECT_EQ(*ids, expected_["recognised"][i].get<Ids>());
    }
    if (text) {
      EXPECT_EQ(*text, expected_["text"][i].get<Ids>());
    }
  }
}

TEST_P(GoldenStrings, AreDecodedAsByHuggingFace) {
  for (size_t i = 0; i < strings_.size(); ++i) {
    SCOPED_TRACE(Json(strings_[i]).dump(-1, ' ', true));
    const Ids ids = expected_["recognised"][i].get<Ids>();
    EXPECT_EQ(tokenizer_->decode(ids, /*skip_special=*/true), expected_["decoded"][i].get<std::string>());
    EXPECT_EQ(tokenizer_->decode(ids, /*skip_special=*/false), expected_["spelt"][i].get<std::string>());
  }
}

TEST_P(GoldenStrings, TemplatesPutTheirTokensInFront) {
  EXPECT_EQ(tokenizer_->prefix(), expected_["prefix"].get<Ids>());
}

class TokenizerFile : public testing::Test {
 protected:
  std::string refusal() const {
    try {
      BpeTokenizer::from_json(file_, "odd.json");
    } catch (const core::UserError& error) {
      EXPECT_FALSE(error.hint().empty());
      return error.what();
    }
    return "accepted";
  }
  Json file_ = core::read_json(kGolden / "qwen2.json");
};

TEST_F(TokenizerFile, WhatIsNotUnderstoodIsNamed) {
  const std::vector<std::pair<std::string, Json>> cases = {
      {"/model/type", "WordPiece"},
      {"/model/byte_fallback", true},
      {"/model/dropout", 0.1},
      {"/model/continuing_subword_prefix", "##"},
      {"/model/end_of_word_suffix", "</w>"},
      {"/model/novelty", 1},
      {"/novelty", 1},
      {"/normalizer/type", "NFKC"},
      {"/pre_tokenizer/type", "Metaspace"},
      {"/pre_tokenizer/pretokenizers/0/type", "Whitespace"},
      {"/pre_tokenizer/pretokenizers/0/behavior", "MergedWithPrevious"},
      {"/pre_tokenizer/pretokenizers/0/pattern", {{"String", " "}}},
      {"/decoder/type", "WordPiece"},
      {"/post_processor", {{"type", "BertProcessing"}}},
      {"/added_tokens/0/single_word", true},
  };
  const Json good = file_;
  for (const auto& [pointer, value] : cases) {
    file_ = good;
    file_[Json::json_pointer(pointer)] = value;
    const std::string named = value.is_string() ? value.get<std::string>() : pointer.substr(pointer.rfind('/') + 1);
    EXPECT_THAT(refusal(), AllOf(HasSubstr("odd.json"), HasSubstr(value.is_object() ? "not understood" : named)))
        << pointer;
  }
}

TEST_F(TokenizerFile, ExpressionsThatLibrariesReadDifferentlyAreNamed) {
  for (const char* part :
       {"^", "$", ".", "\\w", "\\h", "\\1", "(?<", "(?x", "(?>", "}+", "[[", "&&", "\\p{Greek}", "\\b"}) {
    const std::string text = part;
    const std::string pattern = text == "}+"   ? "a{1,2}+"
                                : text == "[[" ? "[[a]]"
                                : text == "&&" ? "[a&&b]"
                                               : text + "a)";
    file_["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {{"Regex", pattern}};
    EXPECT_THAT(refusal(), HasSubstr("regular expression")) << pattern;
    EXPECT_THAT(refusal(), HasSubstr(pattern));
  }
}

TEST_F(TokenizerFile, DamageIsNamed) {
  const Json good = file_;
  file_["model"]["merges"].push_back({"a", "such token"});
  EXPECT_THAT(refusal(), HasSubstr("'such token', which is no token"));
  file_ = good;
  file_["model"]["vocab"]["a"] = -3;
  EXPECT_THAT(refusal(), HasSubstr("the id -3"));
  file_ = good;
  file_["model"]["vocab"]["a"] = int64_t{1} << 40;
  EXPECT_THAT(refusal(), HasSubstr("the id 1099511627776"));
  file_ = good;
  file_["model"]["vocab"]["a"] = file_["model"]["vocab"]["b"];
  EXPECT_THAT(refusal(), HasSubstr("two tokens have the id"));
  file_ = good;
  file_["added_tokens"][0]["id"] = file_["model"]["vocab"]["b"];
  EXPECT_THAT(refusal(), HasSubstr("'<|endoftext|>' has another's id"));
  file_ = good;
  file_["model"].erase("vocab");
  EXPECT_THAT(refusal(), HasSubstr("vocab"));
  file_ = Json::array({1});
  EXPECT_THAT(refusal(), HasSubstr("odd.json"));
}

TEST_F(TokenizerFile, ABytesWithoutATokenIsRefusedWhereItIsMet) {
  file_["model"]["vocab"].erase("z");
  Json merges = Json::array();
  for (const Json& merge : file_["model"]["merges"])
    if (merge.dump().find('z') == std::string::npos) merges.push_back(merge);
  file_["model"]["merges"] = merges;
  const BpeTokenizer tokenizer = BpeTokenizer::from_json(file_, "odd.json");
  EXPECT_NO_THROW(tokenizer.encode("a b", SpecialTokens::kText));
  try {
    tokenizer.encode("a lazy dog", SpecialTokens::kText);
    FAIL() << "accepted";
  } catch (const core::UserError& error) {
    EXPECT_THAT(error.what(), AllOf(HasSubstr("0x7A"), HasSubstr("lazy")));
  }
}

TEST_F(TokenizerFile, OnlyUtf8IsText) {
  EXPECT_THROW(BpeTokenizer::from_json(file_, "").encode("a\xFFz", SpecialTokens::kText), core::UserError);
}

TEST_F(TokenizerFile, IdsWithoutATokenAppearAsReplacementCharacters) {
  const BpeTokenizer tokenizer = BpeTokenizer::from_json(file_, "");
  const int64_t a = file_["model"]["vocab"]["a"].get<int64_t>();
  EXPECT_EQ(tokenizer.decode(Ids{a, tokenizer.vocab_size(), -1, a}, false), "a\uFFFD\uFFFDa");
}

TEST_F(TokenizerFile, PartsOfACharacterAreItsBytes) {
  const BpeTokenizer tokenizer = BpeTokenizer::from_json(file_, "");
  const Ids ids = tokenizer.encode("\U0001F600", SpecialTokens::kText);
  ASSERT_GT(ids.size(), 1u);  // not in the corpus
  std::string text;
  for (const int64_t id : ids) text += tokenizer.decode(Ids{id}, false);
  EXPECT_EQ(text, "\U0001F600");
}

// 2^16 like characters in one word: time n log n, where looking for the best pair each time would take n^2.
TEST_F(TokenizerFile, ALongWordIsJoinedPairByPair) {
  const BpeTokenizer tokenizer = BpeTokenizer::from_json(core::read_json(kGolden / "gpt2.json"), "");
  const std::string text(size_t{1} << 16, 'a');
  EXPECT_EQ(tokenizer.decode(tokenizer.encode(text, SpecialTokens::kText), false), " " + text);
}

TEST(ModelTokenizerOf, ADirectoryIsItsFileOrBytes) {
  TemporaryDirectory folder;
  EXPECT_EQ(model_tokenizer(folder.path(), 264)->encode("\xC3\xA4", SpecialTokens::kText), (Ids{0xC3, 0xA4}));
  EXPECT_THROW(model_tokenizer(folder.path(), 256), core::UserError);
  EXPECT_THROW(model_tokenizer(folder.path(), 32000), core::UserError);
  fs::copy_file(kGolden / "qwen2.json", folder / "tokenizer.json");
  EXPECT_GT(model_tokenizer(folder.path(), 32000)->vocab_size(), 500);
  EXPECT_THROW(model_tokenizer(folder.path(), 300), core::UserError);
}

TEST(ModelTokenizerOf, BytesAreATokenizerLikeOthers) {
  const ByteTokenizer bytes;
  const Tokenizer& tokenizer = bytes;
  EXPECT_EQ(tokenizer.decode(Ids{'a', ByteTokenizer::kEndOfDocument, 'b', 260}, false), "ab\uFFFD");
  EXPECT_EQ(tokenizer.vocab_size(), 257);
}

}  // namespace
}  // namespace moraine::data
