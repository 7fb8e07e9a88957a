#include "coordinator/scheduler.h"

#include <gmock/gmock.h>

namespace moraine::coordinator {
namespace {

using testing::ElementsAre;

std::vector<std::string> ids_in(const ReadyQueue& queue, const Scheduler& scheduler) {
  std::vector<std::string> ids;
  queue.visit(scheduler, [&](std::string_view id) {
    ids.emplace_back(id);
    return true;
  });
  return ids;
}

std::vector<std::string> order(const Scheduler& scheduler, const std::vector<Candidate>& candidates) {
  ReadyQueue queue;
  for (const auto& candidate : candidates) queue.insert(candidate);
  return ids_in(queue, scheduler);
}

TEST(Scheduler, StartsTheLongestUnitFirstAndBreaksTiesById) {
  EXPECT_THAT(order({}, {{"c", "train", 1}, {"b", "train", 5}, {"a", "train", 1}, {"d", "eval", 3}}),
              ElementsAre("b", "d", "a", "c"));
}

TEST(Scheduler, CorrectsThePredictionByTheMeasuredSpeedOfAKind) {
  Scheduler scheduler;
  scheduler.measured("train", 1, 100, 10);  // 10 per second
  scheduler.measured("eval", 1, 100, 100);  // 1 per second
  EXPECT_DOUBLE_EQ(scheduler.predicted_seconds("train", 50), 5);
  EXPECT_DOUBLE_EQ(scheduler.predicted_seconds("eval", 50), 50);
  EXPECT_THAT(order(scheduler, {{"t", "train", 60}, {"e", "eval", 20}}), ElementsAre("e", "t"));
  EXPECT_DOUBLE_EQ(scheduler.predicted_seconds("merge", 11), 2)
      << "an unmeasured kind has the mean speed, (10 + 1) / 2";
}

TEST(ReadyQueue, KeepsTheOrderWhenUnitsLeave) {
  const Candidate a{"a", "train", 1}, b{"b", "train", 5}, c{"c", "eval", 3};
  ReadyQueue queue;
  for (const auto& unit : {a, b, c}) queue.insert(unit);
  queue.erase(b);
  queue.erase(b);
  EXPECT_EQ(queue.size(), 2u);
  EXPECT_THAT(ids_in(queue, {}), ElementsAre("c", "a"));
  queue.erase(a);
  queue.erase(c);
  EXPECT_TRUE(queue.empty());
}

TEST(ReadyQueue, VisitsNoMoreThanIsAskedFor) {
  ReadyQueue queue;
  for (const Candidate& unit : {Candidate{"a", "train", 2}, {"b", "train", 1}, {"c", "train", 3}}) queue.insert(unit);
  std::vector<std::string> ids;
  queue.visit({}, [&](std::string_view id) {
    ids.emplace_back(id);
    return ids.size() < 2;
  });
  EXPECT_THAT(ids, ElementsAre("c", "a"));
}

TEST(Scheduler, AveragesMeasurementsExponentially) {
  Scheduler scheduler;
  scheduler.measured("train", 1, 10, 1);
  scheduler.measured("train", 1, 20, 1);
  EXPECT_DOUBLE_EQ(scheduler.predicted_seconds("train", 13), 1) << "10 + 0.3 * (20 - 10) = 13 per second";
}

TEST(Scheduler, RanksWorkersBySpeedRelativeToTheKind) {
  Scheduler scheduler;
  scheduler.measured("train", 1, 10, 1);
  scheduler.measured("train", 3, 30, 1);
  EXPECT_DOUBLE_EQ(scheduler.relative_speed(3), 3);
  EXPECT_DOUBLE_EQ(scheduler.relative_speed(2), 1);
  std::vector<int> workers = {1, 2, 3};
  scheduler.sort(workers);
  EXPECT_THAT(workers, ElementsAre(3, 1, 2));
}

TEST(Scheduler, IgnoresMeasurementsWithoutCostOrTime) {
  Scheduler scheduler;
  scheduler.measured("train", 1, 0, 1);
  scheduler.measured("train", 1, 1, 0);
  EXPECT_DOUBLE_EQ(scheduler.predicted_seconds("train", 1e9), 1);
}

TEST(Scheduler, PredictsTheEndOfALongestFirstSchedule) {
  EXPECT_DOUBLE_EQ(seconds_to_finish({0, 0}, {}), 0);
  EXPECT_DOUBLE_EQ(seconds_to_finish({3, 0}, {2, 4, 1}), 5) << "4 then 1 beside 3 then 2";
  EXPECT_DOUBLE_EQ(seconds_to_finish({9, 0}, {1}), 9) << "a running unit can be the last to end";
}

}  // namespace
}  // namespace moraine::coordinator
