#include "core/progress.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/log.h"

namespace moraine::core {
namespace {

using testing::EndsWith;
using testing::HasSubstr;

size_t count(const std::string& text, const std::string& part) {
  size_t found = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++found;
  return found;
}

class ProgressTest : public testing::Test {
 protected:
  void SetUp() override {
    log::configure(log::Level::kInfo, "host/test");
    testing::internal::CaptureStderr();
  }
  double now_ = 100;
  std::function<double()> clock_ = [this] { return now_; };
};

TEST_F(ProgressTest, WritesALineEveryTenSecondsWithoutATerminal) {
  Progress progress(false, clock_);
  for (int i = 0; i <= 25; ++i, now_ += 1) progress.update(i / 100.0, 100 - i, "train/german");
  const std::string out = testing::internal::GetCapturedStderr();
  EXPECT_EQ(count(out, "\n"), 2U) << out;
  EXPECT_THAT(out, HasSubstr("info  host/test progress: done_percent=10 eta=1m30s running=train/german"));
  EXPECT_THAT(out, HasSubstr("done_percent=20 eta=1m20s"));
}

TEST_F(ProgressTest, RedrawsATerminalAtMostTenTimesASecond) {
  {
    Progress progress(true, clock_);
    for (int i = 0; i < 1000; ++i, now_ += 0.001) progress.update(i / 2000.0, 1, "train");
  }
  const std::string out = testing::internal::GetCapturedStderr();
  EXPECT_THAT(count(out, "% "), testing::AllOf(testing::Ge(9U), testing::Le(10U))) << out;
  EXPECT_THAT(out, EndsWith("\r\x1b[K")) << "the bar stays on the screen";
}

TEST_F(ProgressTest, LogLinesDoNotMixWithTheBar) {
  {
    Progress progress(true, clock_);
    progress.update(0.5, std::numeric_limits<double>::infinity(), "train/german");
    log::info("unit finished: unit={}", "x");
    EXPECT_THAT(
        testing::internal::GetCapturedStderr(),
        testing::MatchesRegex("\\[#{12}\\.{12}\\]  50%  ETA \\?  train/german\r\x1b\\[K.*unit finished: unit=x\n"
                              "\\[#{12}\\.{12}\\]  50%  ETA \\?  train/german"));
    testing::internal::CaptureStderr();
  }
  testing::internal::GetCapturedStderr();
}

TEST_F(ProgressTest, TheShareWaitsWhileThePlanGrows) {
  Progress progress(false, clock_);
  for (const double share : {0.0, 0.8, 0.4, 0.9}) {
    progress.update(share, 10, "train");
    now_ += 10;
  }
  const std::string out = testing::internal::GetCapturedStderr();
  EXPECT_EQ(count(out, "done_percent=80"), 2U) << out;
  EXPECT_THAT(out, HasSubstr("done_percent=90"));
}

}  // namespace
}  // namespace moraine::core
