#include "coordinator/report/axis.h"

#include <cmath>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace moraine::report {
namespace {

using testing::ElementsAre;

TEST(LinearAxis, TicksAreRoundAndEncloseTheData) {
  const Axis axis = linear_axis(2.3, 5.4, 6);
  EXPECT_THAT(axis.ticks, ElementsAre(2, 3, 4, 5, 6));
  EXPECT_THAT(axis.labels, ElementsAre("2", "3", "4", "5", "6"));
  EXPECT_DOUBLE_EQ(axis.at(4), 0.5);
}

TEST(LinearAxis, TakesTheFinestStepThatKeepsTheLimit) {
  for (const int limit : {3, 5, 8, 13})
    for (const double hi : {1.0, 7.3, 480.0, 0.0031}) {
      const Axis axis = linear_axis(0, hi, limit);
      const double step = axis.ticks[1];
      EXPECT_LE(axis.ticks.size(), static_cast<size_t>(limit)) << hi;
      EXPECT_GE(axis.hi, hi * (1 - 1e-9));
      EXPECT_LT(axis.hi - step, hi);
      // One of the two next finer steps of the 1-2-5 series would have needed more ticks.
      EXPECT_GT(std::ceil(hi / (step / 2.5) - 1e-9) + 1, limit) << hi << " " << limit;
    }
}

TEST(LinearAxis, LabelsCarryTheDecimalsOfTheStepAndSuffixes) {
  EXPECT_THAT(linear_axis(0.42, 0.58, 5).labels, ElementsAre("0.40", "0.45", "0.50", "0.55", "0.60"));
  EXPECT_THAT(linear_axis(0, 20'000'000, 3).labels, ElementsAre("0", "10M", "20M"));
  EXPECT_THAT(linear_axis(-3, -2, 3).labels, ElementsAre("-3.0", "-2.5", "-2.0"));
}

TEST(LinearAxis, AnEmptyRangeIsWidened) {
  const Axis axis = linear_axis(7, 7, 7);
  EXPECT_LT(axis.lo, 7);
  EXPECT_GT(axis.hi, 7);
  EXPECT_EQ(linear_axis(0, 0, 3).at(0), 0.5);
}

TEST(LogAxis, TicksStandAtDecades) {
  const Axis axis = log_axis(0.01, 1000, 7);
  EXPECT_THAT(axis.labels, ElementsAre("0.01", "0.1", "1", "10", "100", "1000"));
  EXPECT_NEAR(axis.at(1), 0.4, 1e-12);  // two of five decades
}

TEST(LogAxis, ShortRangesGetStepsAndLongOnesSkipDecades) {
  EXPECT_THAT(log_axis(0.9, 30, 7).labels, ElementsAre("1", "2", "5", "10", "20"));
  EXPECT_THAT(log_axis(2.9, 6.1, 7).labels, ElementsAre("3", "4", "5", "6"));
  EXPECT_THAT(log_axis(1e-9, 1, 5).labels, ElementsAre("10⁻⁸", "10⁻⁶", "10⁻⁴", "0.01", "1"));
}

TEST(PowerOfTwoAxis, TicksStandAtPowersOfTwo) {
  EXPECT_THAT(power_of_two_axis(4, 64, 9).labels, ElementsAre("4", "8", "16", "32", "64"));
  EXPECT_THAT(power_of_two_axis(1, 16384, 9).ticks, ElementsAre(1, 4, 16, 64, 256, 1024, 4096, 16384));
}

TEST(TimeAxis, TicksAreWholeSecondsMinutesOrHours) {
  EXPECT_THAT(time_axis(50, 6).labels, ElementsAre("0 s", "10 s", "20 s", "30 s", "40 s", "50 s"));
  EXPECT_THAT(time_axis(330, 6).labels, ElementsAre("0:00", "1:00", "2:00", "3:00", "4:00", "5:00"));
  EXPECT_THAT(time_axis(4 * 3600, 4).labels, ElementsAre("0:00 h", "1:00 h", "2:00 h", "3:00 h", "4:00 h"));
}

TEST(Axis, ClipNarrowsTheRangeAndItsTicks) {
  Axis axis = linear_axis(0, 10, 6);
  axis.clip(1, 7);
  EXPECT_THAT(axis.ticks, ElementsAre(2, 4, 6));
  EXPECT_DOUBLE_EQ(axis.at(4), 0.5);
}

TEST(FormatNumber, GroupsThousandsAndNeverShowsANumberAsZero) {
  EXPECT_EQ(format_number(33'270'665'216, 0), "33,270,665,216");
  EXPECT_EQ(format_number(-1234.5, 2), "-1,234.50");
  EXPECT_EQ(format_number(999, 0), "999");
  EXPECT_EQ(format_number(1e-9, 3), "1e-09");
  EXPECT_EQ(format_number(-0.0, 1), "0.0");
  EXPECT_EQ(format_fixed(-1e-9, 3), "0.000");
}

TEST(ChooseDigits, ShowsFourDigitsOfTheLargest) {
  EXPECT_EQ(choose_digits({2.36, 5.37}), 3);
  EXPECT_EQ(choose_digits({97.125}), 2);
  EXPECT_EQ(choose_digits({4, 16, 64}), 0);
  EXPECT_EQ(choose_digits({}), 0);
}

TEST(FormatDuration, CarriesIntoTheNextUnit) {
  EXPECT_EQ(format_duration(0.43), "0.4 s");
  EXPECT_EQ(format_duration(9.97), "10 s");
  EXPECT_EQ(format_duration(161), "2 min 41 s");
  EXPECT_EQ(format_duration(7199.6), "2 h 00 min");
}

}  // namespace
}  // namespace moraine::report
