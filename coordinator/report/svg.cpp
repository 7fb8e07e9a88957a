#include "coordinator/report/svg.h"

#include <fmt/format.h>

#include "coordinator/report/text.h"

namespace moraine::report {

std::string px(double value) {
  std::string text = fmt::format("{:.1f}", value);
  if (text.ends_with(".0")) text.resize(text.size() - 2);
  return text == "-0" ? "0" : text;
}

Svg::Svg(double width, double height, std::string_view label)
    : out_(fmt::format(
          R"(<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0} {1}" width="{0}" height="{1}" role="img" aria-label="{2}">)"
          "\n",
          px(width), px(height), escape_html(label))) {}

void Svg::line(double x1, double y1, double x2, double y2, std::string_view css_class) {
  out_ += fmt::format("<line x1=\"{}\" y1=\"{}\" x2=\"{}\" y2=\"{}\" class=\"{}\"/>\n", px(x1), px(y1), px(x2), px(y2),
                      css_class);
}

void Svg::rect(double x, double y, double width, double height, std::string_view css_class, std::string_view title,
               double opacity) {
  out_ += fmt::format("<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" class=\"{}\"{}><title>{}</title></rect>\n",
                      px(x), px(y), px(width), px(height), css_class,
                      opacity < 1 ? fmt::format(" fill-opacity=\"{:.3f}\"", opacity) : "", escape_html(title));
}

void Svg::circle(double x, double y, double radius, std::string_view css_class, std::string_view title) {
  out_ += fmt::format("<circle cx=\"{}\" cy=\"{}\" r=\"{}\" class=\"{}\"><title>{}</title></circle>\n", px(x), px(y),
                      px(radius), css_class, escape_html(title));
}

void Svg::path(std::string_view data, std::string_view css_class) {
  out_ += fmt::format("<path d=\"{}\" class=\"{}\"/>\n", data, css_class);
}

void Svg::text(double x, double y, std::string_view anchor, std::string_view css_class, std::string_view content,
               double degrees) {
  if (content.empty()) return;
  const std::string turn =
      degrees == 0 ? "" : fmt::format(" transform=\"rotate({} {} {})\"", px(degrees), px(x), px(y));
  out_ += fmt::format("<text x=\"{}\" y=\"{}\" text-anchor=\"{}\" class=\"{}\"{}>{}</text>\n", px(x), px(y), anchor,
                      css_class, turn, escape_html(content));
}

void Svg::open_group(std::string_view css_class) { out_ += fmt::format("<g class=\"{}\">\n", css_class); }
void Svg::close_group() { out_ += "</g>\n"; }
std::string Svg::finish() { return std::move(out_) + "</svg>\n"; }

}  // namespace moraine::report
