#include <algorithm>
#include <cmath>

#include <fmt/format.h>

#include "coordinator/report/axis.h"
#include "coordinator/report/figures.h"
#include "coordinator/report/summary_check.h"
#include "coordinator/report/svg.h"
#include "coordinator/report/text.h"

namespace moraine::report {

using core::Json;

std::string draw_heatmap(const Json& map) {
  constexpr double kFont = 12;
  constexpr size_t kMaxValueColumns = 20;
  const auto rows = map["rows"].get<std::vector<std::string>>(),
             columns = map["columns"].get<std::vector<std::string>>();
  if (rows.empty() || columns.empty()) return figure("heatmap", map, "<p class=\"note\">No values yet.</p>\n");
  const std::string row_label = map["row_label"], column_label = map["column_label"];
  const bool with_values = columns.size() <= kMaxValueColumns;
  std::vector<double> all;
  for (const Json& row : map["values"])
    for (const Json& value : row)
      if (!std::isnan(number_or_nan(value))) all.push_back(value);
  const int digits = map.contains("digits") ? map["digits"].get<int>() : std::min(choose_digits(all), 3);
  const double lowest = all.empty() ? 0 : *std::min_element(all.begin(), all.end());
  const double highest = all.empty() ? 0 : *std::max_element(all.begin(), all.end());
  const double from = lowest > 0 && lowest < 0.3 * highest ? 0 : lowest;  // near zero: let an empty shade mean zero

  double row_names = std::max(pixel_width(row_label, kFont), pixel_width(format_fixed(from, digits), kFont));
  double column_names = 0, cell = with_values ? 46 : 18;
  for (const auto& name : rows) row_names = std::max(row_names, pixel_width(name, kFont));
  for (const auto& name : columns) column_names = std::max(column_names, pixel_width(name, kFont));
  if (with_values)
    for (const double value : all) cell = std::max(cell, pixel_width(format_fixed(value, digits), kFont) + 14);
  const bool turned = column_names + 12 > std::max(cell, 92.0);
  if (!turned) cell = std::max(cell, column_names + 12);
  const double cell_height = with_values ? 32 : cell;
  const double left = row_names + 12, top = 22 + (turned ? column_names * 0.72 + 14 : 20);
  const double right = left + cell * static_cast<double>(columns.size());
  const double bottom = top + cell_height * static_cast<double>(rows.size());

  Svg svg(right + (turned ? column_names * 0.7 : 2), bottom + 30, map["title"].get<std::string>());
  svg.text((left + right) / 2, 13, "middle", "label", column_label);
  svg.text(left - 8, top - 7, "end", "label", row_label);
  for (size_t j = 0; j < columns.size(); ++j)
    svg.text(left + cell * (static_cast<double>(j) + 0.5), top - 7, turned ? "start" : "middle", "tick", columns[j],
             turned ? -45 : 0);
  for (size_t i = 0; i < rows.size(); ++i) {
    const double y = top + cell_height * static_cast<double>(i);
    svg.text(left - 8, y + cell_height / 2 + 4, "end", "tick", rows[i]);
    for (size_t j = 0; j < columns.size(); ++j) {
      const double value = number_or_nan(map["values"][i][j]), x = left + cell * static_cast<double>(j);
      const double shade = std::isnan(value) || highest <= from ? 0 : (value - from) / (highest - from);
      svg.rect(x + 0.5, y + 0.5, cell - 1, cell_height - 1, "cell",
               fmt::format("{} {}\n{} {}\n{}", row_label, rows[i], column_label, columns[j],
                           std::isnan(value) ? "no value" : fmt::format("{:.5g}", value)),
               shade);
      if (with_values)
        svg.text(x + cell / 2, y + cell_height / 2 + 4, "middle",
                 shade < kDarkHeatTurn ? "low" : (shade < kLightHeatTurn ? "middle" : "high"),
                 std::isnan(value) ? "–" : format_fixed(value, digits));
    }
  }
  constexpr int kSteps = 24;
  const double scale = std::min(120.0, right - left), step = scale / kSteps;
  for (int k = 0; k < kSteps; ++k)
    svg.rect(left + k * step, bottom + 12, step + 0.3, 8, "shade", "", (k + 0.5) / kSteps);
  svg.text(left - 8, bottom + 20, "end", "tick", format_fixed(from, digits));
  svg.text(left + scale + 8, bottom + 20, "start", "tick", format_fixed(highest, digits));
  return figure("heatmap", map, svg.finish());
}

}  // namespace moraine::report
