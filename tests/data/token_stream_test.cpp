#include "data/token_stream.h"

#include <numeric>
#include <thread>

#include <gtest/gtest.h>

#include "core/error.h"
#include "tests/temporary_directory.h"

namespace moraine::data {
namespace {

using core::Hdf5File;

constexpr int64_t kSize = 3 * TokenStream::kBlockTokens + 1234;
constexpr int64_t kVocab = 1000;

int64_t token_at(int64_t position) { return position * 7919 % kVocab; }

class TokenStreamTest : public testing::Test {
 protected:
  TokenStreamTest() {
    std::vector<uint16_t> tokens(kSize);
    for (int64_t i = 0; i < kSize; ++i) tokens[static_cast<size_t>(i)] = static_cast<uint16_t>(token_at(i));
    Hdf5File(path_, Hdf5File::Mode::kCreate).write<uint16_t>("train/tokens", tokens, {kSize});
    file_ = std::make_shared<const Hdf5File>(path_, Hdf5File::Mode::kRead);
  }
  static void expect_tokens(const TokenStream& stream, int64_t first, int64_t count) {
    std::vector<int64_t> tokens(static_cast<size_t>(count));
    stream.copy(first, count, tokens.data());
    for (int64_t i = 0; i < count; ++i)
      ASSERT_EQ(tokens[static_cast<size_t>(i)], token_at(first + i)) << "position " << first + i;
  }

  TemporaryDirectory folder_;
  std::filesystem::path path_ = folder_ / "tokens.h5";
  std::shared_ptr<const Hdf5File> file_;
};

TEST_F(TokenStreamTest, CopiesRangesThatCrossBlocks) {
  const TokenStream stream(file_, "train/tokens", kVocab);
  EXPECT_EQ(stream.size(), kSize);
  expect_tokens(stream, 0, 1);
  expect_tokens(stream, TokenStream::kBlockTokens - 3, 6);
  expect_tokens(stream, 5, 2 * TokenStream::kBlockTokens + 5);
  expect_tokens(stream, kSize - 1, 1);
  expect_tokens(stream, kSize, 0);
}

TEST_F(TokenStreamTest, ReturnsTheSameWhenBlocksAreForgotten) {
  const TokenStream stream(file_, "train/tokens", kVocab, /*max_blocks=*/1);
  for (int repeat = 0; repeat < 3; ++repeat)
    for (const int64_t first : {int64_t{0}, 2 * TokenStream::kBlockTokens, TokenStream::kBlockTokens - 10})
      expect_tokens(stream, first, 100);
}

TEST_F(TokenStreamTest, ServesManyThreadsAtOnce) {
  const TokenStream stream(file_, "train/tokens", kVocab, /*max_blocks=*/2);
  std::vector<std::thread> threads;
  for (int64_t thread = 0; thread < 4; ++thread)
    threads.emplace_back([&stream, thread] {
      for (int64_t i = 0; i < 200; ++i) expect_tokens(stream, (thread * 9973 + i * 4099) % (kSize - 300), 300);
    });
  for (auto& thread : threads) thread.join();
}

TEST_F(TokenStreamTest, RefusesTokensOutsideTheVocabulary) {
  const TokenStream stream(file_, "train/tokens", kVocab - 1);
  int64_t token = 0;
  EXPECT_THROW(stream.copy(0, 1, &token), core::UserError);
}

TEST_F(TokenStreamTest, ChecksTheRange) {
  const TokenStream stream(file_, "train/tokens", kVocab);
  int64_t token = 0;
  EXPECT_THROW(stream.copy(kSize, 1, &token), core::InternalError);
  EXPECT_THROW(stream.copy(-1, 1, &token), core::InternalError);
}

}  // namespace
}  // namespace moraine::data
