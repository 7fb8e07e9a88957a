#include "algorithms/finetune/early_stopping.h"

#include <cmath>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include "algorithms/finetune/config.h"
#include "core/error.h"

namespace moraine::algorithms::finetune {
namespace {

using Points = std::vector<std::pair<int64_t, double>>;

const objectives::Metric kLoss{"loss", false, [](const Evaluation& sums) { return sums.loss(); }};
const objectives::Metric kHits{"hits", true, [](const Evaluation& sums) { return sums.accuracy(); }};

/// A "training" that adds one to its parameter in every step, and is scored on a parabola around 6: nats fall to step 6
/// and rise behind it, hits the other way.
struct Walk {
  explicit Walk(const EarlyStoppingConfig& config, const objectives::Metric& metric = kLoss, int64_t steps = 21)
      : stopping(
            config, steps, metric, {{"w", w}},
            [this](const ScoredRows& rows) {
              const double distance = w.item<double>() - 6;
              const auto [begin, end] = rows.of(1000);
              const int64_t targets = end - begin;
              return Evaluation{distance * distance * static_cast<double>(targets), targets, 0,
                                targets / (1 + std::llround(std::abs(distance)))};
            },
            [this](int64_t at, double score) { reported.emplace_back(at, score); }),
        last(steps) {}

  /// Goes on until training ends or `until` steps are done.
  void go(int64_t until = 1000) {
    const at::NoGradGuard no_grad;
    while (step < std::min(until, last) && !ended) {
      w.add_(1);
      ++step;
      if (stopping.due(step)) ended = stopping.scored(step, stopping.sums(0, 1));
    }
  }

  at::Tensor w = at::zeros({1}, at::kFloat).set_requires_grad(true);
  Points reported;
  EarlyStopping stopping;
  int64_t last, step = 0;
  bool ended = false;
};

TEST(EarlyStopping, EndsAfterPatienceAndGivesTheBestParametersBack) {
  Walk walk({.every = 2, .patience = 2});
  walk.go();
  EXPECT_EQ(walk.step, 10) << "best at 6, worse at 8 and 10";
  EXPECT_TRUE(walk.ended);
  const StoppingRecord record = walk.stopping.record();
  EXPECT_EQ(record.steps, 10);
  EXPECT_EQ(record.best_step, 6);
  EXPECT_EQ(record.best_score(), 0);
  EXPECT_EQ(record.curve, (Points{{2, 16}, {4, 4}, {6, 0}, {8, 4}, {10, 16}}));
  EXPECT_EQ(walk.reported, record.curve);
  EXPECT_EQ(walk.w.item<float>(), 10);
  walk.stopping.restore();
  EXPECT_EQ(walk.w.item<float>(), 6);
  EXPECT_TRUE(walk.w.requires_grad());
}

TEST(EarlyStopping, HigherIsBetterWhereTheMetricSaysSo) {
  Walk walk({.every = 2, .patience = 1}, kHits);
  walk.go();
  EXPECT_EQ(walk.step, 8);
  EXPECT_EQ(walk.stopping.record().best_step, 6);
  EXPECT_EQ(walk.stopping.record().best_score(), 1);
}

TEST(EarlyStopping, GainsUpToMinDeltaAreNone) {
  Walk walk({.every = 2, .patience = 2, .min_delta = 4});
  walk.go();
  EXPECT_EQ(walk.stopping.record().best_step, 4) << "from 4 to 0 is not more than 4";
  EXPECT_EQ(walk.step, 8);
}

TEST(EarlyStopping, TheLastStepIsScoredTooAndWithoutRestoringItIsTheResult) {
  Walk walk({.every = 8, .patience = 100, .restore_best = false});
  walk.go();
  EXPECT_EQ(walk.stopping.record().curve, (Points{{8, 4}, {16, 100}, {21, 225}}));
  EXPECT_FALSE(walk.ended) << "all steps were run";
  EXPECT_EQ(walk.stopping.record().best_step, 8);
  walk.stopping.restore();
  EXPECT_EQ(walk.w.item<float>(), 21);
  EXPECT_EQ(walk.stopping.state().size(), 2u) << "no copy is kept";
}

TEST(EarlyStopping, DecidesAlikeFromItsState) {
  Walk whole({.every = 2, .patience = 2});
  whole.go();
  whole.stopping.restore();
  for (int64_t stop = 1; stop < 10; ++stop) {
    Walk first({.every = 2, .patience = 2}), second({.every = 2, .patience = 2});
    first.go(stop);
    const at::NoGradGuard no_grad;
    const models::NamedTensors from = first.stopping.state(), to = second.stopping.state();
    ASSERT_EQ(from.size(), 3u);
    for (size_t i = 0; i < from.size(); ++i) at::Tensor(to[i].second).copy_(from[i].second);
    second.w.copy_(first.w);
    second.step = stop;
    second.go();
    second.stopping.restore();
    EXPECT_EQ(second.stopping.record().to_json(), whole.stopping.record().to_json()) << stop;
    EXPECT_EQ(second.w.item<float>(), 6) << stop;
  }
}

TEST(EarlyStopping, SharesOfMembersAddUpToTheWhole) {
  Walk walk({.every = 2, .sequences = 301});
  const std::vector<double> whole = walk.stopping.sums(0, 1);
  EXPECT_EQ(whole.at(1), 301);
  std::vector<double> sum(4, 0.0);
  for (int64_t member = 0; member < 3; ++member) {
    const auto own = walk.stopping.sums(member, 3);
    for (size_t i = 0; i < 3; ++i) sum[i] += own[i];
  }
  for (size_t i = 0; i < 3; ++i) EXPECT_EQ(sum[i], whole[i]);
}

TEST(StoppingRecord, IsCheckedBeforeItIsBelieved) {
  const StoppingRecord good{8, 4, {{4, 0.5}, {8, 0.75}}};
  EXPECT_FALSE(good.impossible(8));
  EXPECT_EQ(StoppingRecord::from_json(good.to_json()).curve, good.curve);
  EXPECT_TRUE(good.impossible(7)) << "more steps than were planned";
  EXPECT_TRUE((StoppingRecord{8, 5, good.curve}).impossible(8)) << "a best step that was not scored";
  EXPECT_TRUE((StoppingRecord{6, 4, good.curve}).impossible(8)) << "scored behind its end";
  EXPECT_TRUE((StoppingRecord{8, 4, {{8, 0.5}, {4, 0.5}}}).impossible(8));
  EXPECT_TRUE((StoppingRecord{8, 4, {{4, NAN}, {8, 0.5}}}).impossible(8));
  EXPECT_TRUE((StoppingRecord{0, 0, {}}).impossible(8));
}

}  // namespace
}  // namespace moraine::algorithms::finetune
