#pragma once

#include <cstdint>
#include <optional>
#include <span>

namespace moraine::core {

/// start * values[0] * values[1] * ...; nullopt when a factor is negative or the product leaves 63 bits, also on the
/// way to a zero. For sizes out of files, which are believed by nobody.
constexpr std::optional<int64_t> checked_product(std::span<const int64_t> values, int64_t start = 1) {
  for (const int64_t value : values)
    if (value < 0 || __builtin_mul_overflow(start, value, &start)) return std::nullopt;
  return start;
}

}  // namespace moraine::core
