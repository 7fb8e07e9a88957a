#include "coordinator/report/table.h"

#include <cmath>
#include <limits>
#include <sstream>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "coordinator/report/text.h"
#include "tests/coordinator_report/sample.h"

namespace moraine::report {
namespace {

using core::Json;
using testing::HasSubstr;
using testing::Not;

// Two methods side by side on three domains, lower is better.
Json side_by_side() {
  return Json::parse(R"({"title": "Scores", "columns": [
    {"key": "domain", "label": "domain"},
    {"key": "base", "label": "base", "unit": "bits", "better": "lower", "digits": 2},
    {"key": "own", "label": "own expert", "unit": "bits", "better": "lower", "digits": 2}],
    "rows": [{"domain": "größe", "base": 5.37, "own": 2.83}, {"domain": "日本", "base": 2.611, "own": 2.609},
             {"domain": "c", "base": 12.25, "own": null}], "notes": ["measured once"]})");
}

TEST(RenderTable, AlignsAndMarksTheBestOfEachRow) {
  EXPECT_EQ(render_table(side_by_side()),
            "Scores (bits)\n"
            "  domain   base  own expert\n"
            "  ──────  ─────  ──────────\n"
            "  größe    5.37        2.83*\n"
            "  日本     2.61        2.61\n"  // alike as printed: no winner
            "  c       12.25           –\n"  // nothing to compare with
            "  * best in its row (lower is better)\n"
            "  measured once\n");
}

TEST(RenderTable, ColumnsOfDifferentUnitsAreComparedWithinColumns) {
  Json table = side_by_side();
  table["columns"][2]["unit"] = "%";
  table["columns"][2]["better"] = "higher";
  const std::string text = render_table(table);
  EXPECT_THAT(text, HasSubstr("  日本     2.61*       2.61\n"));
  EXPECT_THAT(text, HasSubstr("  größe    5.37        2.83*\n"));
  EXPECT_THAT(text, HasSubstr("  * best in its column\n"));
  EXPECT_THAT(text, HasSubstr("           base  own expert\n  domain   bits           %\n"));
}

TEST(RenderTable, BestInOverridesTheRule) {
  Json table = side_by_side();
  table["best_in"] = "column";
  EXPECT_THAT(render_table(table), HasSubstr("  日本     2.61*       2.61*\n"));
}

TEST(RenderTable, CellsThatPrintAlikeShareTheMark) {
  Json table = side_by_side();
  table["rows"][0]["own"] = 2.6051;  // prints 2.61, as the winner of the column does
  table["rows"][2]["own"] = 3;
  table["best_in"] = "column";
  EXPECT_EQ(lay_out(table).best[0], (std::vector<bool>{false, false, true}));
  EXPECT_EQ(lay_out(table).best[1], (std::vector<bool>{false, true, true}));
}

TEST(RenderTable, NotANumberIsNoValueAndNeverBest) {
  Json table = side_by_side();
  table["rows"][0]["own"] = std::numeric_limits<double>::quiet_NaN();
  EXPECT_THAT(render_table(table), HasSubstr("  größe    5.37           –\n"));
}

TEST(RenderTable, HeadersAreBrokenBeforeTheTableIs) {
  EXPECT_THAT(render_table(side_by_side(), {.width = 26}), HasSubstr("  domain   base  expert\n"));
  EXPECT_THAT(render_table(side_by_side(), {.width = 26}), HasSubstr("  größe    5.37    2.83*\n"));
}

TEST(RenderTable, WideTablesComeInBlocksThatFit) {
  const Json table = sample_summary()["tables"][1];
  for (const size_t width : {40u, 50u, 60u}) {
    std::istringstream lines(render_table(table, {.width = width}));
    int blocks = 0;
    for (std::string line; std::getline(lines, line);) {
      EXPECT_LE(display_width(line), width) << line;
      blocks += line.starts_with("  full-size mixture");
    }
    EXPECT_GT(blocks, 1);
  }
}

TEST(RenderTable, ColourChangesNothingButColour) {
  std::string colored = render_table(side_by_side(), {.color = true});
  EXPECT_THAT(colored, HasSubstr("\x1b[1;32m"));
  for (size_t at; (at = colored.find('\x1b')) != std::string::npos;) colored.erase(at, colored.find('m', at) - at + 1);
  EXPECT_EQ(colored, render_table(side_by_side()));
}

TEST(RenderMarkdown, EscapesCellsAndBoldsTheBest) {
  Json table = side_by_side();
  table["rows"][2]["domain"] = "c_headers|x";
  const std::string text = render_markdown(table);
  EXPECT_THAT(text, HasSubstr("| --- | ---: | ---: |\n"));
  EXPECT_THAT(text, HasSubstr("| größe | 5.37 | **2.83** |\n"));
  EXPECT_THAT(text, HasSubstr("| c\\_headers\\|x | 12.25 | – |\n"));
}

TEST(RenderCsv, QuotesAndKeepsFullPrecision) {
  Json table = side_by_side();
  table["rows"][0]["domain"] = "a \"b\", c";
  table["rows"][0]["own"] = 2.0 / 3.0;
  EXPECT_THAT(render_csv(table),
              testing::StartsWith("domain,base,own\r\n\"a \"\"b\"\", c\",5.37,0.6666666666666666\r\n"));
  EXPECT_THAT(render_csv(table), HasSubstr("c,12.25,\r\n"));
}

TEST(RenderText, ShowsTheHeadlineAndTheHighlightedTables) {
  Json summary = sample_summary();
  EXPECT_THAT(render_text(summary), testing::StartsWith("The mixture of four experts"));
  EXPECT_THAT(render_text(summary), HasSubstr("Held-out text"));
  EXPECT_THAT(render_text(summary), Not(HasSubstr("What each method costs")));
  summary["complete"] = false;
  EXPECT_THAT(render_text(summary), HasSubstr("not complete"));
}

}  // namespace
}  // namespace moraine::report
