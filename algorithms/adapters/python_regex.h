#pragma once

#include <string>

namespace moraine::algorithms::adapters {

/// Whether Python's `re.fullmatch(pattern, path)` matches. Patterns are checked and brought to the C++ library's
/// syntax; what the two read differently and cannot be brought over is a UserError that names it, never another
/// match: look-behind, back references, flags, atomic groups, possessive quantifiers, escapes beyond the common ones,
/// characters beyond ASCII. Time grows with the length of the path, not exponentially. Throws UserError on a malformed
/// pattern, and on one of more than 4,000 characters or a path of more than 1,000.
bool python_full_match(const std::string& pattern, const std::string& path);

}  // namespace moraine::algorithms::adapters
