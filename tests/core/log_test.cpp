#include "core/log.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace moraine::core {
namespace {

using testing::HasSubstr;
using testing::Not;

TEST(Log, LevelsBelowTheConfiguredOneAreSilent) {
  log::configure(log::Level::kWarn, "host/test");
  testing::internal::CaptureStderr();
  log::info("quiet: x={}", 1);
  log::warn("loud: share={}%", 1);
  const std::string out = testing::internal::GetCapturedStderr();
  EXPECT_THAT(out, Not(HasSubstr("quiet")));
  EXPECT_THAT(out, HasSubstr("loud: share=1%"));
}

TEST(Log, ALineIsTimeLevelOriginAndText) {
  log::configure(log::Level::kDebug, "50%/test");
  testing::internal::CaptureStderr();
  log::debug("a");
  log::info("b");
  log::warn("c");
  log::error("d");
  const std::string time = "[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}\\.[0-9]{3} ";
  EXPECT_THAT(testing::internal::GetCapturedStderr(),
              testing::MatchesRegex(time + "debug 50%/test a\n" + time + "info  50%/test b\n" + time +
                                    "warn  50%/test c\n" + time + "error 50%/test d\n"));
}

}  // namespace
}  // namespace moraine::core
