#include "coordinator/report/summary_check.h"

#include <functional>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "coordinator/report/html.h"
#include "coordinator/report/table.h"
#include "core/error.h"
#include "tests/coordinator_report/sample.h"

namespace moraine::report {
namespace {

using core::Json;

TEST(SummaryCheck, AcceptsTheSampleAndTheSmallestSummary) {
  EXPECT_NO_THROW(check_summary(sample_summary()));
  EXPECT_NO_THROW(check_summary(Json::parse(R"({"format": 1, "name": "x", "method": "flexmore", "complete": false})")));
}

TEST(SummaryCheck, EveryMalformedPartIsRefusedByItsPath) {
  struct Case {
    const char* path;
    std::function<void(Json&)> damage;
  };
  const Case cases[] = {
      {"the document", [](Json& s) { s = Json::array(); }},
      {"format", [](Json& s) { s["format"] = 2; }},
      {"complete", [](Json& s) { s.erase("complete"); }},
      {"headlines", [](Json& s) { s["headlines"] = "misspelt"; }},
      {"tables", [](Json& s) { s["tables"] = 3; }},
      {"tables[1].columns[2].better", [](Json& s) { s["tables"][1]["columns"][2]["better"] = "low"; }},
      {"tables[1].columns[2].digits", [](Json& s) { s["tables"][1]["columns"][2]["digits"] = -1; }},
      {"tables[0].columns", [](Json& s) { s["tables"][0]["columns"][1]["key"] = "domain"; }},
      {"tables[0].rows[3].own", [](Json& s) { s["tables"][0]["rows"][3]["own"] = Json::array(); }},
      {"tables[0].rows[3].owm", [](Json& s) { s["tables"][0]["rows"][3]["owm"] = 1; }},
      {"curves[0].series[2].points[7]", [](Json& s) { s["curves"][0]["series"][2]["points"][7] = {1}; }},
      {"curves[0].series[2].points[7]",
       [](Json& s) {
         s["curves"][0]["series"][2]["points"][7] = {nullptr, 1};
       }},
      {"curves[1].log_x", [](Json& s) { s["curves"][1]["log_x"] = "yes"; }},
      {"heatmaps[0].values", [](Json& s) { s["heatmaps"][0]["rows"].push_back("more"); }},
      {"heatmaps[0].values[4]", [](Json& s) { s["heatmaps"][0]["values"][4].push_back(1); }},
      {"timeline.units[5].status", [](Json& s) { s["timeline"]["units"][5]["status"] = "lost"; }},
      {"timeline.units[5].worker", [](Json& s) { s["timeline"]["units"][5].erase("worker"); }},
      {"timeline.units[5].end_s", [](Json& s) { s["timeline"]["units"][5]["end_s"] = nullptr; }},
      {"recipe[0].value", [](Json& s) { s["recipe"][0]["value"] = Json::object(); }},
      {"timing[1].seconds", [](Json& s) { s["timing"][1]["seconds"] = "long"; }},
  };
  for (const Case& c : cases) {
    Json summary = sample_summary();
    c.damage(summary);
    for (const auto& draw : {render_html, +[](const Json& s) { return render_text(s); }}) {
      try {
        draw(summary);
        ADD_FAILURE() << "accepted a malformed " << c.path;
      } catch (const core::InternalError& error) {
        EXPECT_THAT(error.what(), testing::HasSubstr(std::string("malformed summary: ") + c.path + ": "));
      }
    }
  }
}

TEST(SummaryCheck, ASingleTableIsCheckedToo) {
  EXPECT_THROW(render_csv(Json::parse(R"({"title": "t", "columns": []})")), core::InternalError);
  EXPECT_THROW(render_table(Json::parse(R"({"title": "t", "columns": [], "rows": [{"a": 1}]})")), core::InternalError);
}

}  // namespace
}  // namespace moraine::report
