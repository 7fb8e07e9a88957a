#include "algorithms/generate.h"

#include <cmath>
#include <map>
#include <set>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/tensor.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "data/byte_tokenizer.h"
#include "tests/models/random_tensors.h"
#include "tests/temporary_directory.h"

namespace moraine::algorithms {
namespace {

using models::Decoder;
using models::thrown;
using testing::ElementsAre;
using testing::HasSubstr;
using Family = models::DecoderConfig::Family;

constexpr int64_t kDraws = 20000;

at::Tensor logits_of(const std::vector<double>& values) {
  at::Tensor out = at::empty({static_cast<int64_t>(values.size())}, at::kDouble);
  std::copy(values.begin(), values.end(), out.mutable_data_ptr<double>());
  return out;
}

/// How often each token is chosen over many steps.
std::map<int64_t, int64_t> counts(const std::vector<double>& logits, Sampling sampling) {
  std::map<int64_t, int64_t> seen;
  for (int64_t step = 0; step < kDraws; ++step) ++seen[choose_token(logits_of(logits), sampling, step)];
  return seen;
}

/// Probabilities within four standard deviations of what was seen, and nothing else seen.
void expect_shares(const std::map<int64_t, int64_t>& seen, const std::map<int64_t, double>& expected) {
  for (const auto& [token, count] : seen) EXPECT_TRUE(expected.contains(token)) << token << " " << count;
  for (const auto& [token, p] : expected) {
    const double deviation = std::sqrt(p * (1 - p) / static_cast<double>(kDraws));
    const int64_t count = seen.contains(token) ? seen.at(token) : 0;
    EXPECT_NEAR(static_cast<double>(count) / static_cast<double>(kDraws), p, 4 * deviation) << token;
  }
}

// Probabilities 0.1, 0.4, 0.2, 0.3 at temperature 1.
const std::vector<double> kLogits = {std::log(0.1) + 3, std::log(0.4) + 3, std::log(0.2) + 3, std::log(0.3) + 3};

TEST(ChooseToken, GreedyIsTheLikeliestAndOfEqualsTheFirst) {
  EXPECT_EQ(choose_token(logits_of(kLogits), {}, 0), 1);
  EXPECT_EQ(choose_token(logits_of({1, 5, 5, 2}), {}, 7), 1);
}

TEST(ChooseToken, DrawsByTheModelsProbabilities) {
  expect_shares(counts(kLogits, {.temperature = 1}), {{0, 0.1}, {1, 0.4}, {2, 0.2}, {3, 0.3}});
}

TEST(ChooseToken, TemperatureIsAPowerOfTheProbabilities) {
  const double sum = 0.01 + 0.16 + 0.04 + 0.09;
  expect_shares(counts(kLogits, {.temperature = 0.5}),
                {{0, 0.01 / sum}, {1, 0.16 / sum}, {2, 0.04 / sum}, {3, 0.09 / sum}});
}

TEST(ChooseToken, TopKKeepsTheLikeliestAndWhatEqualsTheLast) {
  expect_shares(counts(kLogits, {.temperature = 1, .top_k = 2}), {{1, 4 / 7.0}, {3, 3 / 7.0}});
  expect_shares(counts({0, 1, 0, 1, 1}, {.temperature = 1, .top_k = 2}), {{1, 1 / 3.0}, {3, 1 / 3.0}, {4, 1 / 3.0}});
  expect_shares(counts(kLogits, {.temperature = 1, .top_k = 9}), {{0, 0.1}, {1, 0.4}, {2, 0.2}, {3, 0.3}});
}

TEST(ChooseToken, TopPKeepsTheFewestThatHoldThisMuch) {
  expect_shares(counts(kLogits, {.temperature = 1, .top_p = 0.39}), {{1, 1.0}});
  expect_shares(counts(kLogits, {.temperature = 1, .top_p = 0.69}), {{1, 4 / 7.0}, {3, 3 / 7.0}});
  expect_shares(counts(kLogits, {.temperature = 1, .top_p = 0.71}), {{1, 4 / 9.0}, {3, 3 / 9.0}, {2, 2 / 9.0}});
}

// Of the three likeliest (4 + 3 + 2) / 9, the two likeliest hold 7/9 = 0.78.
TEST(ChooseToken, TopPCountsAfterTopK) {
  expect_shares(counts(kLogits, {.temperature = 1, .top_k = 3, .top_p = 0.77}), {{1, 4 / 7.0}, {3, 3 / 7.0}});
}

TEST(ChooseToken, ADrawIsAFunctionOfSeedAndStep) {
  const std::vector<double> even(1000, 0.0);
  const auto draw = [&](uint64_t seed, int64_t step) {
    return choose_token(logits_of(even), {.temperature = 1, .seed = seed}, step);
  };
  EXPECT_EQ(draw(1, 5), draw(1, 5));
  std::set<int64_t> seen;
  for (int64_t step = 0; step < 20; ++step) seen.insert({draw(1, step), draw(2, step)});
  EXPECT_GT(seen.size(), 30u);
}

TEST(ChooseToken, NumbersThatWentBadEndIt) {
  EXPECT_THROW(choose_token(logits_of({1, std::nan(""), 2}), {}, 0), core::NumericError);
}

class NoContext : public WorkerContext {
 public:
  core::ArtefactPtr artefact(const std::string&) override { return nullptr; }
  TrainOutcome train(TrainJob) override { return {}; }
  void metric(const std::string&, int64_t, double) override {}
  void progress(double done, double) override {
    if (done >= stop_after) throw core::StopRequested("stopped");
  }
  at::Device device() const override { return at::kCPU; }
  std::shared_ptr<void> cached(const std::string&, const std::function<std::shared_ptr<void>()>& make) override {
    return make();
  }
  double stop_after = 1e9;
};

class Generate : public testing::Test {
 protected:
  Generation run(std::vector<int64_t> prompt, GenerationLimits limits, Sampling sampling = {}) {
    seen_.clear();
    return generate(
        decoder_, prompt, sampling, limits, [&](int64_t token) { seen_.push_back(token); }, context_);
  }
  // Greedy decoding without a cache: the whole text again for every token.
  std::vector<int64_t> by_hand(std::vector<int64_t> text, int64_t count) {
    const size_t prompt = text.size();
    for (int64_t i = 0; i < count; ++i) {
      const at::Tensor tokens = at::tensor(text, at::kLong).unsqueeze(0);
      text.push_back(decoder_.forward(tokens)[0][-1].argmax().item<int64_t>());
    }
    return {text.begin() + static_cast<std::ptrdiff_t>(prompt), text.end()};
  }

  Decoder decoder_ = Decoder::from_config(models::tiny_config(Family::kLlama), 7, at::kDouble);  // context 32
  NoContext context_;
  std::vector<int64_t> seen_;
  const std::vector<int64_t> prompt_ = {3, 14, 15, 9, 2};
};

TEST_F(Generate, GreedyEqualsTheArgmaxOfTheWholeTextEveryTime) {
  const Generation result = run(prompt_, {.max_new_tokens = 20});
  EXPECT_EQ(result.tokens, by_hand(prompt_, 20));
  EXPECT_EQ(result.tokens, seen_);
  EXPECT_EQ(result.stopped, StopReason::kMaxNewTokens);
}

TEST_F(Generate, StopsAtAnyEndOfTextWhichIsNotInTheResult) {
  const std::vector<int64_t> all = by_hand(prompt_, 20);
  const int64_t end = all[6];
  const auto first = std::find(all.begin(), all.end(), end) - all.begin();
  const Generation result = run(prompt_, {.max_new_tokens = 20, .end_of_text = {39, end}});
  EXPECT_EQ(result.tokens, std::vector<int64_t>(all.begin(), all.begin() + first));
  EXPECT_EQ(result.stopped, StopReason::kEndOfText);
}

TEST_F(Generate, StopsWhereTheContextEnds) {
  const Generation result = run(prompt_, {.max_new_tokens = 28});
  EXPECT_EQ(result.tokens.size(), 27u);
  EXPECT_EQ(result.stopped, StopReason::kContext);
  EXPECT_EQ(run(prompt_, {.max_new_tokens = 27}).stopped, StopReason::kMaxNewTokens);
  EXPECT_EQ(run(std::vector<int64_t>(31, 3), {}).tokens.size(), 1u);
}

TEST_F(Generate, PromptsThatLeaveNoRoomAreRefused) {
  EXPECT_THAT(thrown<core::UserError>([&] { run(std::vector<int64_t>(32, 3), {}); }), HasSubstr("context of 32"));
  EXPECT_THAT(thrown<core::UserError>([&] { run({}, {}); }), HasSubstr("empty"));
}

TEST_F(Generate, SamplingIsTheSameForASeedAndOtherForAnother) {
  const Sampling sampling = {.temperature = 2, .seed = 5};
  const auto text = run(prompt_, {.max_new_tokens = 20}, sampling).tokens;
  EXPECT_EQ(run(prompt_, {.max_new_tokens = 20}, sampling).tokens, text);
  const auto shorter = run(prompt_, {.max_new_tokens = 10}, sampling).tokens;
  EXPECT_TRUE(std::equal(shorter.begin(), shorter.end(), text.begin()));
  EXPECT_NE(run(prompt_, {.max_new_tokens = 20}, {.temperature = 2, .seed = 6}).tokens, text);
}

TEST_F(Generate, SamplingsOutOfRangeAreRefused) {
  for (const Sampling& sampling :
       {Sampling{.temperature = -1}, Sampling{.temperature = std::nan("")}, Sampling{.temperature = INFINITY},
        Sampling{.temperature = 1, .top_k = -1}, Sampling{.temperature = 1, .top_p = 0},
        Sampling{.temperature = 1, .top_p = 1.5}, Sampling{.top_k = 3}, Sampling{.top_p = 0.5}})
    EXPECT_THROW(run(prompt_, {}, sampling), core::UserError);
}

TEST_F(Generate, AStopRequestEndsItAfterAToken) {
  context_.stop_after = 3;
  EXPECT_THROW(run(prompt_, {.max_new_tokens = 20}), core::StopRequested);
  EXPECT_EQ(seen_.size(), 3u);
}

class ScoreOfAPrompt : public testing::Test {
 protected:
  static models::DecoderConfig config() {
    models::DecoderConfig c = models::tiny_config(Family::kOlmo2);
    c.vocab_size = 264;
    return c;
  }
  Decoder decoder_ = Decoder::from_config(config(), 7, at::kDouble);
  const data::ByteTokenizer bytes_;
};

TEST_F(ScoreOfAPrompt, IsTheSumOfItsTokensLogProbabilities) {
  const std::vector<int64_t> prompt = data::ByteTokenizer::encode("the fox");
  const at::NoGradGuard no_grad;
  const at::Tensor logits = decoder_.forward(at::tensor(prompt, at::kLong).unsqueeze(0))[0];
  double nats = 0;
  int64_t correct = 0;
  for (size_t t = 0; t + 1 < prompt.size(); ++t) {
    const at::Tensor row = logits[static_cast<int64_t>(t)];
    nats -= at::log_softmax(row, -1)[prompt[t + 1]].item<double>();
    correct += row.argmax().item<int64_t>() == prompt[t + 1];
  }
  const Evaluation score = score_prompt(decoder_, prompt, bytes_);
  EXPECT_NEAR(score.nats, nats, 1e-12 * nats);
  EXPECT_EQ(score.tokens, 6);
  EXPECT_EQ(score.bytes, 6);
  EXPECT_EQ(score.correct, correct);
}

TEST_F(ScoreOfAPrompt, NeedsTwoTokensAndFitsTheContext) {
  EXPECT_THROW(score_prompt(decoder_, std::vector<int64_t>{3}, bytes_), core::UserError);
  EXPECT_NO_THROW(score_prompt(decoder_, std::vector<int64_t>(32, 3), bytes_));
  EXPECT_THAT(thrown<core::UserError>([&] { score_prompt(decoder_, std::vector<int64_t>(33, 3), bytes_); }),
              HasSubstr("33 tokens"));
}

TEST(EndOfText, IsThatOfGenerationConfigElseOfConfigElseOfTheTokenizer) {
  TemporaryDirectory folder;
  models::DecoderConfig config = models::tiny_config(Family::kLlama);
  config.vocab_size = 264;
  const data::ByteTokenizer bytes;
  const auto tokens = [&] { return end_of_text_tokens(folder.path(), config, bytes); };
  EXPECT_THAT(tokens(), ElementsAre(256));
  config.eos_token_id = 7;
  EXPECT_THAT(tokens(), ElementsAre(7));
  folder.write("generation_config.json", R"({"temperature": 0.6})");
  EXPECT_THAT(tokens(), ElementsAre(7));
  folder.write("generation_config.json", R"({"eos_token_id": [8, 9]})");
  EXPECT_THAT(tokens(), ElementsAre(8, 9));
  for (const char* wrong : {R"({"eos_token_id": "end"})", R"({"eos_token_id": [264]})", R"({"eos_token_id": -1})"}) {
    folder.write("generation_config.json", wrong);
    EXPECT_THAT(thrown<core::UserError>(tokens), HasSubstr("generation_config.json"));
  }
}

}  // namespace
}  // namespace moraine::algorithms
