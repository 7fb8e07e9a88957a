#include "coordinator/report/text.h"

#include "core/utf8.h"

namespace moraine::report {
namespace {

using core::append_utf8;
using core::next_code_point;

constexpr char32_t kReplacement = 0xFFFD;

size_t columns_of(char32_t c) {
  if ((c >= 0x300 && c <= 0x36F) || (c >= 0x200B && c <= 0x200F) || (c >= 0x20D0 && c <= 0x20FF) ||
      (c >= 0xFE00 && c <= 0xFE0F))
    return 0;
  const bool wide = (c >= 0x1100 && c <= 0x115F) || (c >= 0x2E80 && c <= 0xA4CF) || (c >= 0xAC00 && c <= 0xD7A3) ||
                    (c >= 0xF900 && c <= 0xFAFF) || (c >= 0xFE30 && c <= 0xFE6F) || (c >= 0xFF00 && c <= 0xFF60) ||
                    (c >= 0xFFE0 && c <= 0xFFE6) || (c >= 0x1F300 && c <= 0x1FAFF) || (c >= 0x20000 && c <= 0x3FFFD);
  return wide ? 2 : 1;
}

// Share of the font size, after Helvetica's and DejaVu Sans's metrics (the wider of the two).
double em_width(char32_t c) {
  if (c >= 0x80) return columns_of(c) == 2 ? 1.0 : (columns_of(c) == 0 ? 0.0 : 0.62);
  const char ch = static_cast<char>(c);
  if (std::string_view("iljI.,:;'|! ()[]/tfr").find(ch) != std::string_view::npos) return 0.36;
  if (std::string_view("mwMW@%").find(ch) != std::string_view::npos) return 0.92;
  return ch >= 'A' && ch <= 'Z' ? 0.69 : 0.60;
}

}  // namespace

std::string printable(std::string_view text, bool keep_line_breaks) {
  std::string out;
  out.reserve(text.size());
  for (size_t pos = 0; pos < text.size();) {
    const char32_t c = next_code_point(text, pos);
    const bool control = c < 0x20 || (c >= 0x7F && c < 0xA0) || (c >= 0x202A && c <= 0x202E) ||
                         (c >= 0x2066 && c <= 0x2069) || c == 0xFFFE || c == 0xFFFF;
    if (c == '\n' && keep_line_breaks) {
      out += '\n';
    } else {
      append_utf8(out, c == '\n' || c == '\t' || c == '\r' ? U' ' : (control ? kReplacement : c));
    }
  }
  return out;
}

size_t display_width(std::string_view text) {
  size_t width = 0;
  for (size_t pos = 0; pos < text.size();) width += columns_of(next_code_point(text, pos));
  return width;
}

std::string escape_html(std::string_view text) {
  std::string out;
  for (const char c : printable(text, true)) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      case '\'':
        out += "&#39;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

double pixel_width(std::string_view text, double font_px) {
  double em = 0;
  for (size_t pos = 0; pos < text.size();) em += em_width(next_code_point(text, pos));
  return em * font_px;
}

std::string shorten(std::string_view text, double max_px, double font_px) {
  if (pixel_width(text, font_px) <= max_px) return std::string(text);
  const double room = max_px - pixel_width("…", font_px);
  size_t end = 0, characters = 0;
  double used = 0;
  while (end < text.size()) {
    size_t pos = end;
    used += em_width(next_code_point(text, pos)) * font_px;
    if (used > room) break;
    end = pos;
    ++characters;
  }
  return characters < 3 ? "" : std::string(text.substr(0, end)) + "…";
}

}  // namespace moraine::report
