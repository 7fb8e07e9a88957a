#include "core/utf8.h"

#include <cstdint>

namespace moraine::core {

namespace {
constexpr char32_t kReplacement = 0xFFFD;
}

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

void append_utf8(std::string& out, char32_t code_point) {
  if (code_point < 0x80) {
    out += static_cast<char>(code_point);
    return;
  }
  const int extra = code_point < 0x800 ? 1 : (code_point < 0x10000 ? 2 : 3);
  constexpr uint8_t kLead[] = {0, 0xC0, 0xE0, 0xF0};
  out += static_cast<char>(kLead[extra] | (code_point >> (6 * extra)));
  for (int i = extra - 1; i >= 0; --i) out += static_cast<char>(0x80 | ((code_point >> (6 * i)) & 0x3F));
}

bool is_utf8(std::string_view text) {
  for (size_t pos = 0; pos < text.size();) {
    const size_t start = pos;
    // A malformed byte is one byte long, U+FFFD itself three.
    if (next_code_point(text, pos) == kReplacement && pos - start == 1) return false;
  }
  return true;
}

std::string as_utf8(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (size_t pos = 0; pos < text.size();) append_utf8(out, next_code_point(text, pos));
  return out;
}

}  // namespace moraine::core
