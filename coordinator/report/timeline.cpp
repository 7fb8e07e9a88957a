#include <algorithm>
#include <map>

#include <fmt/format.h>

#include "coordinator/report/axis.h"
#include "coordinator/report/figures.h"
#include "coordinator/report/svg.h"
#include "coordinator/report/text.h"

namespace moraine::report {
namespace {

using core::Json;

constexpr double kWidth = 1080, kLane = 28, kRowGap = 8, kFont = 11, kNameFont = 12;
constexpr double kTop = 16;                       // pixels, for the restart labels
constexpr double kMinBar = 2, kMinFailedBar = 6;  // pixels: short units stay visible

struct Unit {
  std::string label, kind, worker, status;
  double start, end;  // seconds
  int attempt;
};

struct Row {
  std::vector<std::vector<Unit>> lanes;  // units that overlap in time stand below each other
  double busy_s = 0, busy_until_s = 0;
  double height() const { return kLane * static_cast<double>(lanes.size()); }
};

// The coordinator first, then "worker 2" before "worker 10".
struct WorkerOrder {
  bool operator()(const std::string& a, const std::string& b) const {
    if ((a == "coordinator") != (b == "coordinator")) return a == "coordinator";
    return a.size() != b.size() ? a.size() < b.size() : a < b;
  }
};
using Rows = std::map<std::string, Row, WorkerOrder>;

Rows arrange(std::vector<Unit> units) {
  std::stable_sort(units.begin(), units.end(), [](const Unit& a, const Unit& b) { return a.start < b.start; });
  Rows rows;
  for (const Unit& unit : units) {
    Row& row = rows[unit.worker];
    row.busy_s += std::max(0.0, unit.end - std::max(unit.start, row.busy_until_s));
    row.busy_until_s = std::max(row.busy_until_s, unit.end);
    auto lane =
        std::find_if(row.lanes.begin(), row.lanes.end(), [&](const auto& l) { return l.back().end <= unit.start; });
    if (lane == row.lanes.end()) lane = row.lanes.emplace(lane);
    lane->push_back(unit);
  }
  return rows;
}

// The longest form of a label that fits a bar: all of it, less what stands before its first or its last '/', a
// beginning of that, nothing.
std::string fitting_label(const Unit& unit, double width) {
  const std::string attempt = unit.attempt > 1 ? fmt::format(" ({})", unit.attempt) : "";
  for (const size_t begin : {size_t{0}, unit.label.find('/') + 1})
    if (pixel_width(unit.label.substr(begin) + attempt, kFont) <= width - 8) return unit.label.substr(begin) + attempt;
  return shorten(unit.label.substr(unit.label.rfind('/') + 1) + attempt, width - 8, kFont);
}

std::string legend_item(const std::string& group, const std::string& bar, const std::string& name, int64_t count) {
  Svg swatch(14, 12, name);
  swatch.open_group(group);
  swatch.rect(1, 1, 12, 10, bar);
  swatch.close_group();
  return fmt::format("<li>{}<span>{} <span class=\"count\">{}</span></span></li>\n", swatch.finish(), escape_html(name),
                     count);
}

Json unit_table(const Json& units) {
  Json table = Json::parse(R"({"title": "", "columns": [
    {"key": "label", "label": "unit"}, {"key": "kind", "label": "kind"}, {"key": "worker", "label": "worker"},
    {"key": "start_s", "label": "start", "unit": "s", "digits": 1}, {"key": "end_s", "label": "end", "unit": "s", "digits": 1},
    {"key": "attempt", "label": "attempt"}, {"key": "status", "label": "status"}]})");
  table["rows"] = units;
  return table;
}

}  // namespace

std::string draw_timeline(const Json& timeline) {
  std::vector<Unit> units;
  std::vector<std::string> kinds;
  double total_s = 0, left = 0, bottom = kTop;
  for (const Json& u : timeline["units"]) {
    // Clocks of several machines may disagree a little.
    const double start = std::max(0.0, u["start_s"].get<double>()), end = std::max(start, u["end_s"].get<double>());
    units.push_back({u["label"], u["kind"], u["worker"], u["status"], start, end, u["attempt"]});
    total_s = std::max(total_s, end);
    if (std::find(kinds.begin(), kinds.end(), units.back().kind) == kinds.end()) kinds.push_back(units.back().kind);
  }
  Rows rows = arrange(units);
  if (const double coordinating_s = timeline.value("coordinating_s", 0.0); coordinating_s > 0) {
    Row& coordinator = rows["coordinator"];
    if (coordinator.lanes.empty()) coordinator.lanes.emplace_back();
    coordinator.busy_s += coordinating_s;
  }
  for (const auto& [worker, row] : rows) {
    left = std::max(left, pixel_width(worker, kNameFont) + 12);
    bottom += row.height() + kRowGap;
  }
  const double right = kWidth - 90;  // the busy share stands there
  const Axis axis = time_axis(total_s, 12);
  const auto x_px = [&](double seconds) { return left + axis.at(seconds) * (right - left); };
  const auto color_of = [&](const std::string& kind) {
    return fmt::format(
        "b{}", static_cast<size_t>(std::find(kinds.begin(), kinds.end(), kind) - kinds.begin()) % kNumSeriesColors);
  };

  Svg svg(kWidth, bottom + 40, timeline["title"].get<std::string>());
  for (size_t i = 0; i < axis.ticks.size(); ++i) {
    svg.line(x_px(axis.ticks[i]), kTop, x_px(axis.ticks[i]), bottom, "grid");
    svg.text(x_px(axis.ticks[i]), bottom + 16, "middle", "tick", axis.labels[i]);
  }
  svg.text((left + right) / 2, bottom + 34, "middle", "label",
           axis.hi < 120 ? "seconds" : (axis.hi < 7200 ? "minutes : seconds" : "hours : minutes"));
  double y = kTop;
  for (const auto& [worker, row] : rows) {
    const double middle = y + row.height() / 2 + 4;
    svg.text(left - 10, middle, "end", "name", worker);
    svg.text(right + 10, middle, "start", "tick",
             fmt::format("{:.0f} % busy", total_s > 0 ? 100 * row.busy_s / total_s : 0));
    for (const auto& lane : row.lanes) {
      for (const Unit& unit : lane) {
        const double x = x_px(unit.start),
                     width = std::max(unit.status == "failed" ? kMinFailedBar : kMinBar, x_px(unit.end) - x - 0.5);
        svg.open_group(color_of(unit.kind));
        svg.rect(x, y + 2, width, kLane - 4, "bar " + unit.status,
                 fmt::format("{}\n{}, {}, attempt {}\n{} from {}", unit.label, unit.kind, unit.status, unit.attempt,
                             format_duration(unit.end - unit.start), format_duration(unit.start)));
        svg.text(x + 4, y + kLane / 2 + 4, "start", "inside " + unit.status, fitting_label(unit, width));
        svg.close_group();
      }
      y += kLane;
    }
    y += kRowGap;
  }
  for (const double restart : timeline.value("restarts", std::vector<double>())) {
    svg.line(x_px(restart), 2, x_px(restart), bottom, "restart");
    svg.text(x_px(restart) + 5, 11, "start", "restart", "restart");
  }

  std::string legend = "<ul class=\"legend\">\n";
  const auto count = [&](auto matches) { return std::count_if(units.begin(), units.end(), matches); };
  for (const auto& kind : kinds)
    if (const auto n = count([&](const Unit& u) { return u.kind == kind && u.status == "done"; }))
      legend += legend_item(color_of(kind), "bar done", kind, n);
  for (const std::string status : {"failed", "reused"})
    if (const auto n = count([&](const Unit& u) { return u.status == status; }))
      legend += legend_item("", "bar " + status, status, n);
  return figure("timeline", timeline, legend + "</ul>\n<div class=\"scroll\">" + svg.finish() + "</div>\n") +
         fmt::format("<details><summary>All {} units</summary>\n{}</details>\n", units.size(),
                     draw_table(unit_table(timeline["units"])));
}

}  // namespace moraine::report
