#include "core/utf8.h"

#include <gtest/gtest.h>

namespace moraine::core {
namespace {

TEST(Utf8, KnowsWhatIsMalformed) {
  for (const char* good :
       {"", "a", "gr\xC3\xBCn", "\xE2\x82\xAC", "\xF0\x9F\x8C\xB2", "\xEF\xBF\xBD"})  // U+FFFD itself
    EXPECT_TRUE(is_utf8(good)) << good;
  // Latin-1, a lone continuation, cut off, too long a form of '/', a surrogate, above U+10FFFF.
  for (const char* bad : {"gr\xFCn", "\xA0", "a\xE2\x82", "\xC0\xAF", "\xED\xA0\x80", "\xF4\x90\x80\x80"})
    EXPECT_FALSE(is_utf8(bad)) << as_utf8(bad);
}

TEST(Utf8, ReplacesBytesAndKeepsTheRest) {
  EXPECT_EQ(as_utf8("gr\xFCn \xC3\xBC"), "gr\xEF\xBF\xBDn \xC3\xBC");
  EXPECT_TRUE(is_utf8(as_utf8("\xFF\xFE\xED\xA0\x80")));
}

}  // namespace
}  // namespace moraine::core
