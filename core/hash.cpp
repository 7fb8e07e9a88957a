#include "core/hash.h"

#include <array>

#include <openssl/evp.h>

#include "core/error.h"

namespace moraine::core {

namespace {

using Digest = std::array<unsigned char, 32>;

Digest digest_of(const void* data, size_t size) {
  Digest digest{};
  unsigned int length = 0;
  MORAINE_CHECK(EVP_Digest(data, size, digest.data(), &length, EVP_sha256(), nullptr) == 1 && length == digest.size(),
                "OpenSSL has no SHA-256");
  return digest;
}

std::string hexadecimal(const Digest& digest) {
  static constexpr char kHex[] = "0123456789abcdef";
  std::string text;
  for (unsigned char byte : digest) {
    text += kHex[byte >> 4];
    text += kHex[byte & 15];
  }
  return text;
}

// One byte at a time over the reflected polynomial 0x82F63B78.
constexpr std::array<uint32_t, 256> make_crc_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t crc = i;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? 0x82F63B78U : 0U);
    table[i] = crc;
  }
  return table;
}
constexpr auto kCrcTable = make_crc_table();

}  // namespace

std::string sha256(std::span<const std::byte> data) { return hexadecimal(digest_of(data.data(), data.size())); }

std::string sha256(std::string_view text) { return sha256(std::as_bytes(std::span(text))); }

Sha256::Sha256() : context_(EVP_MD_CTX_new()) {
  MORAINE_CHECK(
      context_ != nullptr && EVP_DigestInit_ex(static_cast<EVP_MD_CTX*>(context_), EVP_sha256(), nullptr) == 1,
      "OpenSSL has no SHA-256");
}

Sha256::~Sha256() { EVP_MD_CTX_free(static_cast<EVP_MD_CTX*>(context_)); }

void Sha256::add(std::span<const std::byte> data) {
  MORAINE_CHECK(EVP_DigestUpdate(static_cast<EVP_MD_CTX*>(context_), data.data(), data.size()) == 1, "SHA-256 failed");
}

std::string Sha256::finish() {
  Digest digest{};
  MORAINE_CHECK(EVP_DigestFinal_ex(static_cast<EVP_MD_CTX*>(context_), digest.data(), nullptr) == 1, "SHA-256 failed");
  return hexadecimal(digest);
}

uint32_t crc32c(std::span<const std::byte> data, uint32_t seed) {
  uint32_t crc = ~seed;
  for (std::byte byte : data) crc = kCrcTable[(crc ^ static_cast<uint32_t>(byte)) & 0xFF] ^ (crc >> 8);
  return ~crc;
}

uint64_t derive_seed(uint64_t seed, std::string_view purpose) {
  const std::string text = fmt::format("{}/{}", seed, purpose);
  const Digest digest = digest_of(text.data(), text.size());
  uint64_t derived = 0;
  for (int i = 7; i >= 0; --i) derived = (derived << 8) | digest[static_cast<size_t>(i)];
  return derived;
}

}  // namespace moraine::core
