#include "models/kv_cache.h"

#include <gtest/gtest.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/matmul.h>

#include "core/error.h"
#include "models/decoder.h"
#include "models/mixture.h"
#include "tests/models/random_tensors.h"

namespace moraine::models {
namespace {

using Family = DecoderConfig::Family;

// Rounding of float64: the same sums in matrices of other shapes, through two layers.
constexpr double kRounding = 1e-12;
constexpr int64_t kLength = 13;

/// The largest relative difference between next_logits() and forward() when the text comes in such pieces.
double worst_difference(Decoder& decoder, const std::vector<int64_t>& pieces, int64_t batch = 2) {
  const at::Tensor tokens = random_tokens(batch, kLength, decoder.config().vocab_size, 3);
  const at::Tensor expected = decoder.forward(tokens);
  KeyValueCache cache;
  double worst = 0;
  for (const int64_t piece : pieces) {
    const at::Tensor next = tokens.narrow(1, cache.length(), piece);
    const at::Tensor logits = decoder.next_logits(next, cache);
    worst = std::max(worst, relative_error(logits, expected.select(1, cache.length() - 1)));
  }
  EXPECT_EQ(cache.length(), kLength);
  return worst;
}

const std::vector<int64_t> kTokenByToken(kLength, 1), kPromptFirst = {6, 1, 1, 1, 1, 1, 1, 1}, kChunks = {3, 5, 1, 4};

void expect_equal_to_the_whole(const DecoderConfig& config) {
  Decoder decoder = Decoder::from_config(config, 7, at::kDouble);
  EXPECT_LE(worst_difference(decoder, kTokenByToken), kRounding);
  EXPECT_LE(worst_difference(decoder, kPromptFirst), kRounding);
  EXPECT_LE(worst_difference(decoder, kChunks), kRounding);
}

DecoderConfig grouped(Family family) {
  DecoderConfig config = tiny_config(family);
  config.num_heads = 4, config.num_kv_heads = 2, config.head_dim = 6;
  return config;
}

class CacheOfEveryFamily : public testing::TestWithParam<Family> {};
INSTANTIATE_TEST_SUITE_P(KeyValueCache, CacheOfEveryFamily,
                         testing::Values(Family::kLlama, Family::kMistral, Family::kQwen2, Family::kOlmo2,
                                         Family::kFlexOlmo, Family::kFlexMore),
                         [](const auto& test) { return std::string(tiny_config(test.param).to_json()["model_type"]); });

TEST_P(CacheOfEveryFamily, PiecesGiveTheLogitsOfTheWhole) { expect_equal_to_the_whole(tiny_config(GetParam())); }

TEST_P(CacheOfEveryFamily, PiecesGiveTheLogitsOfTheWholeWhereHeadsShareKeys) {
  expect_equal_to_the_whole(grouped(GetParam()));
}

TEST(KeyValueCache, RotationsAreThoseOfTheTokensPlaces) {
  DecoderConfig config = grouped(Family::kLlama);
  config.rope_scaling = {.type = RopeScaling::Type::kLinear, .factor = 3};
  expect_equal_to_the_whole(config);
  config.rope_scaling = {.type = RopeScaling::Type::kLlama3, .factor = 8, .original_max_position_embeddings = 16};
  expect_equal_to_the_whole(config);
}

TEST(KeyValueCache, WindowsSeeTheLastTokensOnly) {
  DecoderConfig mistral = grouped(Family::kMistral), qwen = grouped(Family::kQwen2);
  for (const int64_t window : {1, 4, 12, 13, 40}) {
    SCOPED_TRACE(window);
    mistral.sliding_window = qwen.sliding_window = window;
    qwen.max_window_layers = 1;  // the first layer sees everything
    expect_equal_to_the_whole(mistral);
    expect_equal_to_the_whole(qwen);
  }
}

TEST(KeyValueCache, AttachedFunctionsAreInIt) {
  class LowRankChange : public SlotFunction {
   public:
    explicit LowRankChange(const Slot& slot)
        : a_(random_tensor({2, slot.in}, 1)), b_(random_tensor({slot.out, 2}, 2)) {}
    at::Tensor forward(const at::Tensor& x, const SlotBase& base, const Pass&) override {
      return base.forward(x) + at::matmul(at::matmul(x, a_.t()), b_.t());
    }
    NamedTensors parameters() const override { return {}; }

   private:
    at::Tensor a_, b_;
  };
  Decoder decoder = Decoder::from_config(grouped(Family::kLlama), 7, at::kDouble);
  for (const Slot& slot : decoder.slots())
    if (slot.kind == SlotKind::kLinear) decoder.attach(slot.path, std::make_shared<LowRankChange>(slot));
  EXPECT_LE(worst_difference(decoder, kPromptFirst), kRounding);
}

TEST(KeyValueCache, ItGrowsBeyondItsFirstReserve) {
  Decoder decoder = Decoder::from_config(grouped(Family::kOlmo2), 7, at::kDouble);
  const at::Tensor tokens = random_tokens(1, 200, decoder.config().vocab_size, 3);
  KeyValueCache cache;
  at::Tensor logits = decoder.next_logits(tokens.slice(1, 0, 50), cache);
  for (int64_t t = 50; t < 200; ++t) logits = decoder.next_logits(tokens.narrow(1, t, 1), cache);
  EXPECT_LE(relative_error(logits, decoder.forward(tokens).select(1, -1)), kRounding);
}

TEST(KeyValueCache, ThePromptAloneHasTheBitsOfForward) {
  Decoder decoder = Decoder::from_config(grouped(Family::kLlama), 7, at::kFloat);
  const at::Tensor tokens = random_tokens(2, 9, decoder.config().vocab_size, 3);
  KeyValueCache cache;
  const at::Tensor last = decoder.next_logits(tokens, cache);
  EXPECT_TRUE(same_bits(last, decoder.forward(tokens).select(1, -1).contiguous()));
}

TEST(KeyValueCache, HoldsNoGradients) {
  Decoder decoder = Decoder::from_config(tiny_config(Family::kLlama), 7, at::kFloat);
  decoder.make_trainable();
  KeyValueCache cache;
  EXPECT_FALSE(decoder.next_logits(random_tokens(1, 3, 40, 1), cache).requires_grad());
  EXPECT_FALSE(cache.layer(0).keys.requires_grad());
}

TEST(KeyValueCache, BelongsToOneBatch) {
  Decoder decoder = Decoder::from_config(tiny_config(Family::kLlama), 7, at::kFloat);
  KeyValueCache cache;
  decoder.next_logits(random_tokens(2, 3, 40, 1), cache);
  EXPECT_THROW(decoder.next_logits(random_tokens(1, 1, 40, 1), cache), core::InternalError);
}

}  // namespace
}  // namespace moraine::models
