#include "coordinator/report/text.h"

#include <cstdint>

namespace moraine::report {
namespace {

constexpr char32_t kReplacement = 0xFFFD;

/// Decodes the code point at `pos` and moves past it; malformed UTF-8 gives U+FFFD for one byte.
char32_t next_code_point(std::string_view text, size_t& pos) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t lead = byte(pos++);
  if (lead < 0x80) return lead;
  const int extra =
      lead >= 0xF0 && lead < 0xF5 ? 3 : (lead >= 0xE0 && lead < 0xF0 ? 2 : (lead >= 0xC2 && lead < 0xE0 ? 1 : 0));
  if (extra == 0 || pos + extra > text.size()) return kReplacement;
  char32_t c = lead & (0x3F >> extra);
  for (int i = 0; i < extra; ++i) {
    if ((byte(pos + i) & 0xC0) != 0x80) return kReplacement;
    c = (c << 6) | (byte(pos + i) & 0x3F);
  }
  constexpr char32_t kSmallest[] = {0, 0x80, 0x800, 0x10000};
  if (c < kSmallest[extra] || c > 0x10FFFF || (c >= 0xD800 && c <= 0xDFFF)) return kReplacement;
  pos += extra;
  return c;
}

void append_utf8(std::string& out, char32_t c) {
  if (c < 0x80) {
    out += static_cast<char>(c);
    return;
  }
  const int extra = c < 0x800 ? 1 : (c < 0x10000 ? 2 : 3);
  constexpr uint8_t kLead[] = {0, 0xC0, 0xE0, 0xF0};
  out += static_cast<char>(kLead[extra] | (c >> (6 * extra)));
  for (int i = extra - 1; i >= 0; --i) out += static_cast<char>(0x80 | ((c >> (6 * i)) & 0x3F));
}

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
