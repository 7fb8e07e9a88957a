#include "coordinator/report/figures.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <regex>
#include <set>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace moraine::report {
namespace {

using core::Json;
using testing::HasSubstr;
using testing::Not;

size_t count(const std::string& text, const std::string& part) {
  size_t n = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++n;
  return n;
}

Json curve_of(Json points) {
  return {{"title", "t"},
          {"x_label", "x"},
          {"y_label", "y"},
          {"series", {{{"name", "only"}, {"points", std::move(points)}}}}};
}

TEST(SpreadLabels, KeepsLabelsThatAreApartAndCentresThoseThatAreNot) {
  EXPECT_THAT(spread_labels({10, 50, 90}, 15, 0, 100), testing::ElementsAre(10, 50, 90));
  EXPECT_THAT(spread_labels({50, 50, 50}, 10, 0, 100), testing::ElementsAre(40, 50, 60));
  EXPECT_THAT(spread_labels({1, 2}, 10, 0, 100), testing::ElementsAre(0, 10));  // pushed off the upper end
  EXPECT_THAT(spread_labels({99, 100}, 10, 0, 100), testing::ElementsAre(90, 100));
  EXPECT_TRUE(spread_labels({}, 10, 0, 100).empty());
}

TEST(DrawCurve, AMissingValueBreaksTheLine) {
  const std::string whole = draw_curve(curve_of({{1, 1}, {2, 2}, {3, 3}, {4, 4}}));
  const std::string broken = draw_curve(curve_of({{1, 1}, {2, nullptr}, {3, 3}, {4, 4}}));
  const std::regex line("<path d=\"(M[^M\"]*)+\" class=\"line\"");
  EXPECT_TRUE(std::regex_search(whole, line));
  EXPECT_THAT(count(broken, "class=\"marker\""), 3u);
  std::smatch match;
  ASSERT_TRUE(std::regex_search(broken, match, std::regex("<path d=\"([^\"]*)\" class=\"line\"")));
  EXPECT_EQ(count(match[1], "M"), 2u);
}

TEST(DrawCurve, PointsWithoutAPlaceOnALogAxisAreCounted) {
  Json curve = curve_of({{1, 1.0}, {2, 0.0}, {3, -2.0}, {4, 0.01}});
  EXPECT_THAT(draw_curve(curve), Not(HasSubstr("Not shown")));
  curve["log_y"] = true;
  EXPECT_THAT(draw_curve(curve),
              HasSubstr("Not shown: points at or below zero, which have no place on a log scale (2)."));
}

TEST(DrawCurve, WithoutAnyPointSaysSo) {
  EXPECT_THAT(draw_curve(curve_of(Json::array())), HasSubstr("No points yet."));
}

TEST(DrawCurve, ManySeriesGetALegendOfAllNames) {
  Json curve = curve_of(Json::array());
  curve["series"].clear();
  for (int i = 0; i < 9; ++i)
    curve["series"].push_back({{"name", "expert" + std::to_string(i)}, {"points", {{0, i}, {1, i}}}});
  const std::string html = draw_curve(curve);
  for (int i = 0; i < 9; ++i) EXPECT_THAT(html, HasSubstr("<span>expert" + std::to_string(i) + "</span>"));
  EXPECT_THAT(html, Not(HasSubstr("class=\"name\"")));
}

TEST(DrawTimeline, UnitsThatOverlapStandInDifferentLanes) {
  const auto rows_of_bars = [](double second_start) {
    Json timeline = {{"title", "t"}, {"units", Json::array()}};
    for (const double start : {0.0, second_start})
      timeline["units"].push_back({{"label", "u"},
                                   {"kind", "k"},
                                   {"worker", "worker 1"},
                                   {"start_s", start},
                                   {"end_s", start + 5},
                                   {"attempt", 1},
                                   {"status", "done"}});
    const std::string html = draw_timeline(timeline);
    std::set<std::string> ys;
    const std::regex bar("y=\"([0-9.]+)\"[^>]*class=\"bar done\"><title>u");
    for (std::sregex_iterator it(html.begin(), html.end(), bar), end; it != end; ++it) ys.insert((*it)[1]);
    return ys.size();
  };
  EXPECT_EQ(rows_of_bars(5), 1u);
  EXPECT_EQ(rows_of_bars(4), 2u);
}

// The style sheet's colours as linear RGB, for WCAG 2.1 contrast computed here from its definition.
using Color = std::array<double, 3>;
Color variable(const std::string& rules, const std::string& name) {
  std::smatch match;
  if (!std::regex_search(rules, match, std::regex(name + ":#([0-9a-f]+);")))
    throw std::runtime_error("no colour " + name);
  std::string hex = match[1];
  if (hex.size() == 3) hex = {hex[0], hex[0], hex[1], hex[1], hex[2], hex[2]};
  Color color;
  for (size_t i = 0; i < 3; ++i) color[i] = std::stoi(hex.substr(2 * i, 2), nullptr, 16) / 255.0;
  return color;
}
double contrast(Color a, Color b) {
  const auto luminance = [](const Color& c) {
    const auto linear = [](double v) { return v <= 0.04045 ? v / 12.92 : std::pow((v + 0.055) / 1.055, 2.4); };
    return 0.2126 * linear(c[0]) + 0.7152 * linear(c[1]) + 0.0722 * linear(c[2]);
  };
  const double x = luminance(a), y = luminance(b);
  return (std::max(x, y) + 0.05) / (std::min(x, y) + 0.05);
}

TEST(StyleSheet, EveryTextReachesTheContrastOf4Point5InBothSchemes) {
  const std::string css = style_sheet();
  const size_t dark_at = css.find("prefers-color-scheme:dark");
  for (const bool dark : {false, true}) {
    const std::string rules = dark ? css.substr(dark_at) : css.substr(0, dark_at);
    const Color page = variable(rules, "--page"), heat = variable(rules, "--heat"), on = variable(rules, "--on");
    for (const char* name : {"--ink", "--muted", "--accent", "--bad"})
      EXPECT_GE(contrast(page, variable(rules, name)), 4.5) << name;
    EXPECT_GE(contrast(variable(rules, "--best"), variable(rules, "--ink")), 4.5);
    for (size_t i = 0; i < kNumSeriesColors; ++i) {
      const Color series = variable(rules, "--s" + std::to_string(i));
      EXPECT_GE(contrast(page, series), 4.5) << "series " << i << (dark ? " dark" : " light");
      EXPECT_GE(contrast(on, series), 4.5) << "text on series " << i << (dark ? " dark" : " light");
    }
    for (double shade = 0; shade <= 1; shade += 0.001) {
      Color cell;
      for (size_t i = 0; i < 3; ++i) cell[i] = page[i] + shade * (heat[i] - page[i]);
      const bool white = dark ? shade < kDarkHeatTurn : shade >= kLightHeatTurn;
      const Color text = white ? Color{1, 1, 1} : Color{0, 0, 0};
      EXPECT_GE(contrast(cell, text), 4.5) << "heat map shade " << shade << (dark ? " dark" : " light");
    }
  }
}

}  // namespace
}  // namespace moraine::report
