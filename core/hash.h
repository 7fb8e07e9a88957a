#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace moraine::core {

/// SHA-256 as 64 lower-case hex digits.
std::string sha256(std::span<const std::byte> data);
std::string sha256(std::string_view text);

/// CRC-32C (Castagnoli), as in protocol frames and journal records.
uint32_t crc32c(std::span<const std::byte> data, uint32_t seed = 0);

/// A 64-bit seed derived from a parent seed and a purpose; distinct purposes give unrelated streams.
uint64_t derive_seed(uint64_t seed, std::string_view purpose);

}  // namespace moraine::core
