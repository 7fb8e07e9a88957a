#include "data/pre_tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/error.h"

namespace moraine::data {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

// U+0664 ARABIC-INDIC DIGIT FOUR, U+2167 ROMAN NUMERAL EIGHT and U+00BD VULGAR FRACTION ONE HALF are Nd, Nl and No.
TEST(DigitSplit, NumbersOfEveryKindStandAloneOrInRuns) {
  const std::string text = "a12b\u0664\u2167\u00bdc 3";
  EXPECT_THAT(digit_split(true)(text), ElementsAre("a", "1", "2", "b", "\u0664", "\u2167", "\u00bd", "c ", "3"));
  EXPECT_THAT(digit_split(false)(text), ElementsAre("a", "12", "b", "\u0664\u2167\u00bd", "c ", "3"));
  EXPECT_THAT(digit_split(true)(""), IsEmpty());
}

TEST(RegexSplit, KeepsMatchesTheRestOrBoth) {
  const auto split = [](bool matches, bool rest) { return RegexSplit{UnicodeRegex("[ab]+"), matches, rest}; };
  EXPECT_THAT(split(true, true)("xaby b"), ElementsAre("x", "ab", "y ", "b"));
  EXPECT_THAT(split(true, false)("xaby b"), ElementsAre("ab", "b"));
  EXPECT_THAT(split(false, true)("xaby b"), ElementsAre("x", "y "));
}

TEST(RegexSplit, EmptyMatchesSplitNothing) {
  EXPECT_THAT((RegexSplit{UnicodeRegex("z*")}("xzzy")), ElementsAre("x", "zz", "y"));
}

TEST(PreTokenize, StepsFollowEachOther) {
  std::vector<RegexSplit> steps;
  steps.push_back(digit_split(true));
  steps.push_back({UnicodeRegex(R"( ?\p{L}+)")});
  EXPECT_THAT(pre_tokenize(steps, "no 12 or"), ElementsAre("no", " ", "1", "2", " or"));
  EXPECT_THAT(pre_tokenize(steps, ""), IsEmpty());
  EXPECT_THAT(pre_tokenize({}, "whole"), ElementsAre("whole"));
}

TEST(UnicodeRegex, MalformedPatternsAreNamed) {
  for (const char* pattern : {"(", "[a", "a{2", "*", "\\", "\\p{", "\\p{Xx}"})
    EXPECT_THROW(UnicodeRegex{pattern}, core::UserError) << pattern;
}

TEST(ToNfc, ComposesAndOrdersMarks) {
  EXPECT_EQ(to_nfc("e\u0301"), "\u00e9");
  EXPECT_EQ(to_nfc("q\u0307\u0323"), "q\u0323\u0307");
  EXPECT_EQ(to_nfc(""), "");
}

}  // namespace
}  // namespace moraine::data
