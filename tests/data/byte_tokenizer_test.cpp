#include "data/byte_tokenizer.h"

#include <gtest/gtest.h>

#include "core/error.h"

namespace moraine::data {
namespace {

TEST(ByteTokenizer, EncodesEachByteOfUtf8AsItsValue) {
  EXPECT_EQ(ByteTokenizer::encode("a\n\xC3\xA4"), (std::vector<int64_t>{97, 10, 0xC3, 0xA4}));
}

TEST(ByteTokenizer, DecodesEveryByteValueItEncodes) {
  std::string all;
  for (int value = 0; value < 256; ++value) all.push_back(static_cast<char>(value));
  EXPECT_EQ(ByteTokenizer::decode(ByteTokenizer::encode(all)), all);
}

TEST(ByteTokenizer, DecodesTheEndOfADocumentToNoText) {
  EXPECT_EQ(ByteTokenizer::decode({'a', ByteTokenizer::kEndOfDocument, 'b'}), "ab");
}

TEST(ByteTokenizer, RefusesTokensOfOtherTokenizers) {
  EXPECT_THROW(ByteTokenizer::decode({257}), core::UserError);
  EXPECT_THROW(ByteTokenizer::decode({-1}), core::UserError);
}

}  // namespace
}  // namespace moraine::data
