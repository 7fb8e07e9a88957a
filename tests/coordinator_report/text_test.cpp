#include "coordinator/report/text.h"

#include <gtest/gtest.h>

namespace moraine::report {
namespace {

TEST(EscapeHtml, LeavesNoMarkupInTextOrAttributes) {
  EXPECT_EQ(escape_html("<b a='1' c=\"2\">&amp;"), "&lt;b a=&#39;1&#39; c=&quot;2&quot;&gt;&amp;amp;");
}

TEST(Printable, ReplacesControlCharactersAndTurnsLineBreaksIntoSpaces) {
  EXPECT_EQ(printable("a\x1b[31mb\nc\td\x7f"), "a\xEF\xBF\xBD[31mb c d\xEF\xBF\xBD");
  EXPECT_EQ(printable("\u202Egnp.exe"), "\uFFFDgnp.exe");  // right-to-left override
}

TEST(Printable, ReplacesMalformedUtf8) {
  EXPECT_EQ(printable("\xC3\xA9"), "é");
  EXPECT_EQ(printable("\xC3"), "\uFFFD");                      // cut off
  EXPECT_EQ(printable("\xC0\x80"), "\uFFFD\uFFFD");            // overlong NUL
  EXPECT_EQ(printable("\xED\xA0\x80"), "\uFFFD\uFFFD\uFFFD");  // surrogate
  EXPECT_EQ(printable("\xF0\x9F\x98\x80"), "\U0001F600");
}

TEST(DisplayWidth, CountsTerminalColumns) {
  EXPECT_EQ(display_width("größe"), 5u);
  EXPECT_EQ(display_width("日本"), 4u);
  EXPECT_EQ(display_width("e\u0301"), 1u);  // e and a combining accent
}

TEST(Shorten, KeepsTheLongestBeginningThatFits) {
  EXPECT_EQ(shorten("german", 1000, 12), "german");
  EXPECT_EQ(shorten("a", 0, 12), "");
  for (const double width : {40.0, 60.0, 80.0}) {
    const std::string cut = shorten("evaluate/mixture/german", width, 12);
    EXPECT_TRUE(cut.ends_with("…")) << cut;
    EXPECT_LE(pixel_width(cut, 12), width);
  }
}

}  // namespace
}  // namespace moraine::report
