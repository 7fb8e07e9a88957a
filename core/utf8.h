#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace moraine::core {

/// Decodes the code point at `pos` and moves past it; malformed UTF-8 gives U+FFFD for one byte.
char32_t next_code_point(std::string_view text, size_t& pos);

bool is_utf8(std::string_view text);

/// The text with U+FFFD in place of every byte that is no UTF-8: for messages and JSON that quote foreign bytes.
std::string as_utf8(std::string_view text);

void append_utf8(std::string& out, char32_t code_point);

}  // namespace moraine::core
