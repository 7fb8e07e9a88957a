#include <algorithm>
#include <cmath>
#include <limits>

#include <fmt/format.h>

#include "coordinator/report/axis.h"
#include "coordinator/report/figures.h"
#include "coordinator/report/summary_check.h"
#include "coordinator/report/svg.h"
#include "coordinator/report/text.h"

namespace moraine::report {
namespace {

using core::Json;

constexpr double kWidth = 560, kHeight = 330, kTop = 30, kBottom = kHeight - 44;
constexpr double kFont = 12, kLabelGap = 15, kMaxLabelWidth = 170;
constexpr size_t kMaxLabelled = 8;
constexpr size_t kMaxMarkers = 24;  // a line of more points shows them only under the pointer
constexpr size_t kMaxTitles = 80;   // per series

struct Point {
  double x, y;  // y = NaN: a gap in the line
};
struct Series {
  std::string name;
  std::vector<Point> points;
};
struct Range {
  double lo = std::numeric_limits<double>::infinity(), hi = -std::numeric_limits<double>::infinity();
  void include(double v) {
    lo = std::min(lo, v);
    hi = std::max(hi, v);
  }
};

class Chart {
 public:
  explicit Chart(const Json& curve)
      : curve_(curve),
        log_x_(curve.value("log_x", false)),
        log_y_(curve.value("log_y", false)),
        svg_(kWidth, kHeight, curve["title"].get<std::string>()) {}

  std::string draw() {
    collect();
    if (!(x_.hi >= x_.lo)) return figure("curve", curve_, "<p class=\"note\">No points yet.</p>\n");
    double widest = 0;
    for (const Series& series : series_) widest = std::max(widest, pixel_width(series.name, kFont));
    const bool labelled = series_.size() <= kMaxLabelled && widest <= kMaxLabelWidth;
    right_ = kWidth - (labelled ? widest + 24 : 16);
    draw_axes();
    for (size_t i = 0; i < series_.size(); ++i) draw_series(i);
    if (labelled) draw_labels();
    return figure(
        "curve", curve_, (labelled ? "" : legend()) + svg_.finish(),
        dropped_ == 0
            ? ""
            : fmt::format("Not shown: points at or below zero, which have no place on a log scale ({}).", dropped_));
  }

 private:
  void collect() {
    for (const Json& series : curve_["series"]) {
      Series& kept = series_.emplace_back();
      kept.name = series["name"];
      for (const Json& pair : series["points"]) {
        const Point point{pair[0], number_or_nan(pair[1])};
        if ((log_x_ && point.x <= 0) || (log_y_ && point.y <= 0)) {
          ++dropped_;
          continue;
        }
        kept.points.push_back(point);
        if (std::isnan(point.y)) continue;
        x_.include(point.x);
        y_.include(point.y);
        powers_of_two_ = powers_of_two_ && point.x > 0 && std::exp2(std::round(std::log2(point.x))) == point.x;
      }
    }
  }

  double x_px(double x) const { return left_ + x_axis_.at(x) * (right_ - left_); }
  double y_px(double y) const { return kBottom - y_axis_.at(y) * (kBottom - kTop); }

  void draw_axes() {
    x_axis_ = !log_x_ ? linear_axis(x_.lo, x_.hi, 8)
                      : (powers_of_two_ ? power_of_two_axis(x_.lo, x_.hi, 9) : log_axis(x_.lo, x_.hi, 8));
    if (!log_x_ && x_.hi > x_.lo) x_axis_.clip(std::min(x_.lo, x_axis_.ticks[1]), x_.hi);  // steps need no empty margin
    const double margin = log_y_ ? std::pow(std::max(y_.hi / y_.lo, 1.01), 0.04) : 1;
    y_axis_ = log_y_ ? log_axis(y_.lo / margin, y_.hi * margin, 7) : linear_axis(y_.lo, y_.hi, 7);
    double widest = 0;
    for (const auto& label : y_axis_.labels) widest = std::max(widest, pixel_width(label, kFont));
    left_ = widest + 10;
    for (size_t i = 0; i < y_axis_.ticks.size(); ++i) {
      const double y = y_px(y_axis_.ticks[i]);
      svg_.line(left_, y, right_, y, "grid");
      svg_.text(left_ - 7, y + 4, "end", "tick", y_axis_.labels[i]);
    }
    svg_.line(left_, kBottom, right_, kBottom, "axis");
    for (size_t i = 0; i < x_axis_.ticks.size(); ++i) {
      const double x = x_px(x_axis_.ticks[i]);
      svg_.line(x, kBottom, x, kBottom + 4, "axis");
      svg_.text(x, kBottom + 17, "middle", "tick", x_axis_.labels[i]);
    }
    svg_.text((left_ + right_) / 2, kHeight - 8, "middle", "label",
              curve_["x_label"].get<std::string>() + (log_x_ ? " (log scale)" : ""));
    svg_.text(0, 13, "start", "label", curve_["y_label"].get<std::string>() + (log_y_ ? " (log scale)" : ""));
  }

  // Seven colours, then the same ones dashed, then dotted.
  static std::string series_class(size_t i) {
    static constexpr const char* kStyles[] = {"", " dash", " dot"};
    return fmt::format("s{}{}", i % kNumSeriesColors, kStyles[i / kNumSeriesColors % 3]);
  }

  void draw_series(size_t i) {
    const auto& [name, points] = series_[i];
    std::string d;
    bool pen_down = false;
    for (const Point& point : points) {
      if (!std::isnan(point.y)) d += fmt::format("{}{} {}", pen_down ? "L" : "M", px(x_px(point.x)), px(y_px(point.y)));
      pen_down = !std::isnan(point.y);
    }
    svg_.open_group(series_class(i));
    if (!d.empty()) svg_.path(d, "line");
    for (size_t k = 0; k < points.size(); k += points.size() / kMaxTitles + 1) {
      if (std::isnan(points[k].y)) continue;
      svg_.circle(x_px(points[k].x), y_px(points[k].y), 3, points.size() <= kMaxMarkers ? "marker" : "hit",
                  fmt::format("{}\n{} {:g}\n{} {:.5g}", name, curve_["x_label"].get<std::string>(), points[k].x,
                              curve_["y_label"].get<std::string>(), points[k].y));
    }
    svg_.close_group();
  }

  void draw_labels() {
    struct End {
      size_t series;
      double x, y;
    };
    std::vector<End> ends;
    for (size_t i = 0; i < series_.size(); ++i) {
      const auto& points = series_[i].points;
      const auto last = std::find_if(points.rbegin(), points.rend(), [](const Point& p) { return !std::isnan(p.y); });
      ends.push_back(last == points.rend() ? End{i, right_, kBottom} : End{i, x_px(last->x), y_px(last->y)});
    }
    std::stable_sort(ends.begin(), ends.end(), [](const End& a, const End& b) { return a.y < b.y; });
    std::vector<double> desired;
    for (const End& end : ends) desired.push_back(end.y);
    const std::vector<double> placed = spread_labels(desired, kLabelGap, kTop, kBottom);
    for (size_t k = 0; k < ends.size(); ++k) {
      svg_.open_group(series_class(ends[k].series));
      svg_.path(fmt::format("M{} {}L{} {}", px(ends[k].x + 4), px(ends[k].y), px(right_ + 14), px(placed[k])),
                "leader");
      svg_.text(right_ + 18, placed[k] + 4, "start", "name", series_[ends[k].series].name);
      svg_.close_group();
    }
  }

  std::string legend() const {
    std::string html = "<ul class=\"legend\">";
    for (size_t i = 0; i < series_.size(); ++i) {
      Svg swatch(22, 8, series_[i].name);
      swatch.path("M0 4L22 4", "line");
      html += fmt::format("<li class=\"{}\">{}<span>{}</span></li>\n", series_class(i), swatch.finish(),
                          escape_html(series_[i].name));
    }
    return html + "</ul>\n";
  }

  const Json& curve_;
  const bool log_x_, log_y_;
  Svg svg_;
  std::vector<Series> series_;
  Range x_, y_;
  bool powers_of_two_ = true;
  int dropped_ = 0;
  Axis x_axis_, y_axis_;
  double left_ = 0, right_ = kWidth;
};

}  // namespace

std::vector<double> spread_labels(const std::vector<double>& desired, double gap, double lo, double hi) {
  // With p_i = z_i + i gap the condition is that z ascends: isotonic regression of desired_i - i gap by pooling
  // neighbours.
  struct Pool {
    double sum;
    int count;
    double mean() const { return sum / count; }
  };
  std::vector<Pool> pools;
  for (size_t i = 0; i < desired.size(); ++i) {
    Pool pool{desired[i] - gap * static_cast<double>(i), 1};
    for (; !pools.empty() && pools.back().mean() > pool.mean(); pools.pop_back()) {
      pool.sum += pools.back().sum;
      pool.count += pools.back().count;
    }
    pools.push_back(pool);
  }
  const double highest = hi - gap * (static_cast<double>(desired.size()) - 1);
  std::vector<double> placed;
  for (const Pool& pool : pools)
    for (int k = 0; k < pool.count; ++k)
      placed.push_back(std::max(lo, std::min(highest, pool.mean())) + gap * static_cast<double>(placed.size()));
  return placed;
}

std::string draw_curve(const Json& curve) { return Chart(curve).draw(); }

}  // namespace moraine::report
