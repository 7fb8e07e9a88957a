#pragma once

#include <string>
#include <string_view>

// Text on its way into a terminal, an HTML page or a picture.
namespace moraine::report {

/// Valid UTF-8 without control characters: line breaks and tabs become spaces, the rest U+FFFD. Names come from recipes
/// and data files, so no escape sequence of theirs may reach a terminal or break the markup.
std::string printable(std::string_view text, bool keep_line_breaks = false);

/// Terminal columns: 0 for combining marks, 2 for East Asian wide characters and emoji, 1 otherwise.
size_t display_width(std::string_view text);

/// For HTML and XML text and quoted attributes; printable() with line breaks kept (tooltips show them).
std::string escape_html(std::string_view text);

/// Estimated width in pixels in a sans-serif font of this size: enough to place labels, a few per cent off.
double pixel_width(std::string_view text, double font_px);

/// The longest beginning that fits with "…" after it; the text itself if it fits; "" if fewer than three characters
/// would.
std::string shorten(std::string_view text, double max_px, double font_px);

}  // namespace moraine::report
