#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace moraine::core {

/// Optimal-string-alignment Damerau-Levenshtein distance.
int edit_distance(std::string_view a, std::string_view b);

/// The nearest candidate within max(1, len/3) edits, or "".
std::string nearest_name(std::string_view name, std::span<const std::string> candidates);

/// "did you mean 'rank'? Valid: alpha, rank, ..." - the tail of every unknown-name message.
std::string name_hint(std::string_view name, std::span<const std::string> candidates);

}  // namespace moraine::core
