#include "coordinator/report/html.h"

#include <cstdlib>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "core/file.h"
#include "tests/coordinator_report/sample.h"

namespace moraine::report {
namespace {

using core::Json;

// Not HasSubstr: a failure would print the page.
bool contains(const std::string& html, const std::string& part) { return html.find(part) != std::string::npos; }

TEST(RenderHtml, ContainsEveryRowSeriesCellUnitAndSetting) {
  const Json summary = sample_summary();
  const std::string html = render_html(summary);
  const auto expect = [&](const Json& text) { EXPECT_TRUE(contains(html, text.get<std::string>())) << text; };
  expect(summary["headline"]);
  expect(summary["hash"]);
  for (const Json& table : summary["tables"])
    for (const Json& row : table["rows"]) expect(row[table["columns"][0]["key"].get<std::string>()]);
  for (const Json& curve : summary["curves"])
    for (const Json& series : curve["series"])
      EXPECT_TRUE(contains(html, "class=\"name\">" + series["name"].get<std::string>() + "<"));
  for (const Json& map : summary["heatmaps"]) {
    expect(map["title"]);
    for (const Json& row : map["values"])
      for (const Json& value : row) EXPECT_TRUE(contains(html, fmt::format("\n{:.5g}</title>", value.get<double>())));
  }
  for (const Json& unit : summary["timeline"]["units"])
    EXPECT_TRUE(contains(html, "<title>" + unit["label"].get<std::string>() + "\n"));
  for (const Json& setting : summary["recipe"]) expect(setting["path"]);
  for (const auto& [part, version] : summary["versions"].items()) expect(version);
  for (const Json& entry : summary["timing"]) expect(entry["label"]);
}

TEST(RenderHtml, RefersToNothingOutsideAndRunsNothing) {
  const std::string html = render_html(sample_summary());
  for (const char* part : {"<script", "<link", "<img", "@import", "url(", "href=", "src="})
    EXPECT_FALSE(contains(html, part));
}

TEST(RenderHtml, TextOfTheSummaryNeverBecomesMarkup) {
  Json summary = sample_summary();
  const std::string evil = "</title><i a='\"&";
  for (const char* key : {"name", "method", "headline", "hash"}) summary[key] = evil;
  summary["tables"][0]["title"] = summary["tables"][0]["rows"][0]["domain"] =
      summary["tables"][0]["columns"][0]["label"] = evil;
  summary["curves"][0]["series"][0]["name"] = summary["curves"][0]["x_label"] = summary["curves"][0]["title"] = evil;
  summary["heatmaps"][0]["rows"][0] = summary["heatmaps"][0]["column_label"] = evil;
  summary["timeline"]["units"][4]["label"] = summary["timeline"]["units"][5]["kind"] =
      summary["timeline"]["units"][6]["worker"] = evil;
  summary["recipe"][0] = {{"path", evil}, {"value", evil}, {"origin", evil}};
  summary["versions"][evil] = evil;
  summary["timing"][0]["label"] = evil;
  EXPECT_FALSE(contains(render_html(summary), "<i a="));
}

TEST(RenderHtml, SectionsWithoutContentAreLeftOut) {
  const std::string html =
      render_html(Json::parse(R"({"format": 1, "name": "x", "method": "flexmore", "complete": false})"));
  EXPECT_FALSE(contains(html, "<section>"));
  EXPECT_TRUE(contains(html, "not complete"));
}

// Python's expat is the judge: it accepts well-formed XML only.
TEST(RenderHtml, EverySvgIsWellFormedXml) {
  const std::filesystem::path page = std::filesystem::path(MORAINE_BINARY_DIR) / "report_sample.html";
  core::write_atomically(page, render_html(sample_summary()));
  const std::string script =
      "import re, sys, xml.dom.minidom as m; found = re.findall('<svg.*?</svg>', open(sys.argv[1]).read(), re.S); "
      "[m.parseString(s) for s in found]; sys.exit(0 if len(found) >= 11 else 5)";
  EXPECT_EQ(std::system(fmt::format("python3 -c \"{}\" '{}'", script, page.string()).c_str()), 0) << page;
}

}  // namespace
}  // namespace moraine::report
