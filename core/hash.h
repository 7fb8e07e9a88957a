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

/// SHA-256 of bytes that come in pieces. Not thread-safe.
class Sha256 {
 public:
  Sha256();
  ~Sha256();
  Sha256(const Sha256&) = delete;
  Sha256& operator=(const Sha256&) = delete;
  void add(std::span<const std::byte> data);
  /// 64 hex digits over all that was added; nothing may be added afterwards.
  std::string finish();

 private:
  void* context_;  // OpenSSL's
};

/// CRC-32C (Castagnoli), as in protocol frames and journal records. `seed` is the checksum of what came before, so
/// crc32c(b, crc32c(a)) == crc32c(a followed by b).
uint32_t crc32c(std::span<const std::byte> data, uint32_t seed = 0);

/// A 64-bit seed derived from a parent seed and a purpose; distinct purposes give unrelated streams. It is the first
/// eight bytes, little-endian, of SHA-256("<seed>/<purpose>"): derive_seed(run_seed, "router/german").
uint64_t derive_seed(uint64_t seed, std::string_view purpose);

}  // namespace moraine::core
