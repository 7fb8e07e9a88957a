#include "algorithms/continual/metrics.h"

#include <gtest/gtest.h>

#include "core/error.h"

namespace moraine::algorithms::continual {
namespace {

using Rows = std::vector<std::vector<std::optional<double>>>;
constexpr double kExact = 1e-12;  // a few sums of two-digit numbers in double

AccuracyMatrix matrix(Rows rows, std::vector<std::optional<double>> before = {}, std::vector<int64_t> images = {}) {
  AccuracyMatrix m{std::move(rows), std::move(before), std::move(images), {}};
  if (m.before.empty()) m.before.resize(m.r.size());
  if (m.images.empty()) m.images.assign(m.r.size(), 10);
  return m;
}

double value(const std::string& name, const AccuracyMatrix& m) { return metric(name, m).value_or(-1e9); }

TEST(ContinualMetrics, WorkedExample) {
  const AccuracyMatrix m = matrix({{90, 10, 5}, {70, 80, 6}, {60, 75, 85}}, {10, 10, 5});
  EXPECT_NEAR(value("last_taskmean", m), 220.0 / 3, kExact);
  EXPECT_NEAR(value("forgetting_chaudhry", m), 17.5, kExact);
  EXPECT_NEAR(value("bwt", m), -17.5, kExact);
  EXPECT_NEAR(value("bwt_continuum", m), -55.0 / 3, kExact);
  EXPECT_NEAR(value("fwt", m), 0.5, kExact);
  EXPECT_NEAR(value("learning_accuracy", m), 85, kExact);
  EXPECT_NEAR(value("transfer", m), 7.75, kExact);
  EXPECT_NEAR(value("average_mtil", m), (220.0 / 3 + 55 + 32) / 3, kExact);
  EXPECT_NEAR(value("accuracy_diaz", m), 460.0 / 6, kExact);
  EXPECT_NEAR(value("average_taskmean", m), (90 + 75 + 220.0 / 3) / 3, kExact);
  EXPECT_NEAR(value("last_mtil", m), 220.0 / 3, kExact);
  EXPECT_NEAR(value("forgetting_first", m), 17.5, kExact);
  EXPECT_NEAR(value("forgetting_pycil", m), 17.5, kExact);
  EXPECT_NEAR(value("fwt_continuum", m), 8, kExact);
  EXPECT_NEAR(value("stability", m), 67.5, kExact);
  EXPECT_NEAR(value("newest", m), 85, kExact);
  EXPECT_NEAR(value("bwt_positive", m), 0, kExact);
  EXPECT_NEAR(value("remembering", m), 100 - 55.0 / 3, kExact);
}

// One old task with the column (50, 80, 70), then (50, 60, 70); the second task's column is constant and adds nothing.
TEST(ContinualMetrics, ConventionsOfForgettingDiffer) {
  const AccuracyMatrix risen = matrix({{50, 0, 0}, {80, 40, 0}, {70, 40, 9}}),
                       gained = matrix({{50, 0, 0}, {60, 40, 0}, {70, 40, 9}});
  EXPECT_NEAR(2 * value("forgetting_chaudhry", risen), 10, kExact);
  EXPECT_NEAR(2 * value("forgetting_pycil", risen), 10, kExact);
  EXPECT_NEAR(2 * value("forgetting_first", risen), -20, kExact);
  EXPECT_NEAR(2 * value("forgetting_chaudhry", gained), -10, kExact);
  EXPECT_NEAR(2 * value("forgetting_pycil", gained), 0, kExact);
  EXPECT_NEAR(2 * value("forgetting_first", gained), -20, kExact);
}

TEST(ContinualMetrics, PooledWeighsTasksByTheirImages) {
  AccuracyMatrix m = matrix({{90, {}}, {30, 60}}, {}, {30, 10});
  EXPECT_NEAR(value("last_pooled", m), (30 * 30 + 60 * 10) / 40.0, kExact);
  EXPECT_NEAR(value("average_pooled", m), (90 + 37.5) / 2, kExact);
  m.images = {7, 7};  // equal numbers: pooled and task mean agree
  EXPECT_NEAR(value("last_pooled", m), value("last_taskmean", m), kExact);
  EXPECT_NEAR(value("average_pooled", m), value("average_taskmean", m), kExact);
}

TEST(ContinualMetrics, AConstantMatrixForgetsNothing) {
  const AccuracyMatrix m =
      matrix(Rows(4, std::vector<std::optional<double>>(4, 37.0)), std::vector<std::optional<double>>(4, 37.0));
  for (const char* name :
       {"forgetting_chaudhry", "forgetting_pycil", "forgetting_first", "bwt", "bwt_continuum", "fwt"})
    EXPECT_EQ(value(name, m), 0) << name;
}

TEST(ContinualMetrics, RelationsHoldOnManyMatrices) {
  uint32_t state = 1;
  const auto next = [&] {
    state = state * 1664525 + 1013904223;
    return static_cast<double>(state >> 8) / (1 << 24) * 100;
  };
  for (int round = 0; round < 50; ++round) {
    Rows rows(5, std::vector<std::optional<double>>(5));
    for (auto& row : rows)
      for (auto& entry : row) entry = next();
    const AccuracyMatrix m = matrix(rows);
    EXPECT_LE(value("forgetting_chaudhry", m), value("forgetting_pycil", m) + kExact);
    EXPECT_NEAR(value("bwt", m), -value("forgetting_first", m), kExact);
    EXPECT_NEAR(value("last_mtil", m), value("last_taskmean", m), kExact);
    EXPECT_GE(value("forgetting_pycil", m), 0);
  }
}

TEST(ContinualMetrics, IntransigenceComparesWithTheJointModel) {
  AccuracyMatrix m = matrix({{90, {}}, {30, 60}});
  EXPECT_FALSE(metric("intransigence", m));
  m.joint = {92, 70};
  EXPECT_NEAR(value("intransigence", m), 6, kExact);
}

// A true zero counts; a cell that was not evaluated makes what reads it unknown and nothing else.
TEST(ContinualMetrics, NotEvaluatedIsNotZero) {
  const AccuracyMatrix seen = matrix({{90, {}, {}}, {70, 80, {}}, {0, 75, 85}});
  EXPECT_NEAR(value("forgetting_chaudhry", seen), (90.0 + 5) / 2, kExact);
  EXPECT_NEAR(value("last_taskmean", seen), 160.0 / 3, kExact);
  for (const char* name : {"fwt", "fwt_continuum", "transfer", "average_mtil"})
    EXPECT_FALSE(metric(name, seen)) << name;
  const AccuracyMatrix hole = matrix({{90, {}, {}}, {{}, 80, {}}, {60, 75, 85}});
  EXPECT_FALSE(metric("forgetting_chaudhry", hole));
  EXPECT_FALSE(metric("average_pooled", hole));
  EXPECT_TRUE(metric("last_pooled", hole));
  const AccuracyMatrix one = matrix({{50}});
  EXPECT_FALSE(metric("bwt", one));
  EXPECT_NEAR(value("last_pooled", one), 50, kExact);
}

// Whatever a table says a metric needs is exactly what it takes for a value.
TEST(ContinualMetrics, NeedsAreStatedRightly) {
  const AccuracyMatrix seen = matrix({{90, {}}, {70, 80}});
  AccuracyMatrix all = matrix({{90, 10}, {70, 80}}, {3, 4});
  all.joint = {91, 81};
  for (const auto& info : metric_table()) {
    EXPECT_EQ(metric(info.name, seen).has_value(), !why_missing(info, {2, false, false})) << info.name;
    EXPECT_TRUE(metric(info.name, all).has_value()) << info.name;
    EXPECT_FALSE(why_missing(info, {2, true, true})) << info.name;
    EXPECT_EQ(metric(info.name, matrix({{90}}, {3})).has_value(), !why_missing(info, {1, true, false})) << info.name;
  }
}

TEST(ContinualMetrics, UnknownNamesGetTheNearest) {
  try {
    metric("forgeting_chaudhry", matrix({{1}}));
    FAIL();
  } catch (const core::UserError& error) {
    EXPECT_NE(error.hint().find("forgetting_chaudhry"), std::string::npos) << error.hint();
  }
}

}  // namespace
}  // namespace moraine::algorithms::continual
