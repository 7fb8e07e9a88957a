#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "core/json.h"

// Parts of the page from checked parts of a summary, each a whole <figure> with caption and notes. Colours and text
// styles come from the style sheet (html_style.cpp); every mark of a picture carries its exact values in a <title>.
namespace moraine::report {

/// Line chart. Up to eight short-named series are labelled at their ends, more get a legend. Points at or below zero
/// have no place on a log axis: they are left out and counted in a note. A log x axis of powers of two gets its ticks
/// there.
std::string draw_curve(const core::Json& curve);

/// Matrix of shaded cells with their values; more than 20 columns show shades only.
std::string draw_heatmap(const core::Json& map);

/// Units over workers: one row per worker, bars coloured by kind, restarts as dashed lines, then all units as a table.
std::string draw_timeline(const core::Json& timeline);

/// A table with its best values marked.
std::string draw_table(const core::Json& table);

constexpr size_t kNumSeriesColors = 7;
/// Shades (0..1) from which text upon a heat map cell turns white (light scheme) and black (dark scheme): where both
/// reach a contrast of 4.58.
constexpr double kLightHeatTurn = 0.707, kDarkHeatTurn = 0.560;
std::string style_sheet();

/// Positions nearest to the desired ones (least squares, order kept) that are at least `gap` apart and within [lo, hi];
/// `desired` ascending. If they do not fit, they start at `lo` and overrun `hi`.
std::vector<double> spread_labels(const std::vector<double>& desired, double gap, double lo, double hi);

/// `body` is markup; title and notes come from `part`. Notes that drawing adds go into `extra_note`.
std::string figure(std::string_view css_class, const core::Json& part, const std::string& body,
                   const std::string& extra_note = "");

}  // namespace moraine::report
