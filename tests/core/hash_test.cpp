#include "core/hash.h"

#include <set>
#include <vector>

#include <gtest/gtest.h>

namespace moraine::core {
namespace {

uint32_t crc_of(const std::vector<uint8_t>& bytes) { return crc32c(std::as_bytes(std::span(bytes))); }

// FIPS 180-2, appendix B.
TEST(Sha256, EqualsPublishedVectors) {
  EXPECT_EQ(sha256(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(sha256("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(sha256(std::string(1000000, 'a')), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

// RFC 3720, appendix B.4.
TEST(Crc32c, EqualsPublishedVectors) {
  std::vector<uint8_t> rising(32);
  for (size_t i = 0; i < rising.size(); ++i) rising[i] = static_cast<uint8_t>(i);
  EXPECT_EQ(crc_of(std::vector<uint8_t>(32, 0x00)), 0x8A9136AAU);
  EXPECT_EQ(crc_of(std::vector<uint8_t>(32, 0xFF)), 0x62A8AB43U);
  EXPECT_EQ(crc_of(rising), 0x46DD794EU);
}

TEST(Crc32c, ContinuesFromAnEarlierChecksum) {
  const std::string_view text = "123456789";
  const auto bytes = std::as_bytes(std::span(text));
  EXPECT_EQ(crc32c(bytes.subspan(4), crc32c(bytes.first(4))), 0xE3069283U);
}

// Computed with Python: int.from_bytes(hashlib.sha256(b"42/router/german").digest()[:8], "little").
TEST(DeriveSeed, IsTheDocumentedPrefixOfSha256) { EXPECT_EQ(derive_seed(42, "router/german"), 12784483174434608060U); }

TEST(DeriveSeed, DiffersBySeedAndPurpose) {
  const std::set<uint64_t> seeds = {derive_seed(1, "a"), derive_seed(2, "a"), derive_seed(1, "b"),
                                    derive_seed(11, "a")};
  EXPECT_EQ(seeds.size(), 4U);
}

}  // namespace
}  // namespace moraine::core
