#pragma once

#include <string>
#include <string_view>

namespace moraine::report {

/// Writes one <svg> element. Coordinates are pixels of its view box. Texts and titles (tooltips) are escaped here;
/// sizes and colours come from the page's style sheet through the classes.
class Svg {
 public:
  /// `label` is what a screen reader says.
  Svg(double width, double height, std::string_view label);
  void line(double x1, double y1, double x2, double y2, std::string_view css_class);
  void rect(double x, double y, double width, double height, std::string_view css_class, std::string_view title = "",
            double opacity = 1);
  void circle(double x, double y, double radius, std::string_view css_class, std::string_view title);
  void path(std::string_view data, std::string_view css_class);
  /// `anchor` is start, middle or end; `degrees` turns the text about (x, y). Empty text writes nothing.
  void text(double x, double y, std::string_view anchor, std::string_view css_class, std::string_view content,
            double degrees = 0);
  void open_group(std::string_view css_class);
  void close_group();
  std::string finish();

 private:
  std::string out_;
};

/// A coordinate with at most one decimal.
std::string px(double value);

}  // namespace moraine::report
