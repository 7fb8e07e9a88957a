#pragma once

#include <cstdint>
#include <vector>

namespace moraine::data {

/// A pseudo-random permutation of [0, size) that is computed element by element: no table, no state, the same numbers
/// on every platform. Six Feistel rounds over the smallest 2 * b bits that hold `size`, with splitmix64's finaliser as
/// round function; values that fall outside [0, size) are permuted again until one falls inside (cycle walking, fewer
/// than four passes on average).
/// Source: Black, Rogaway, Ciphers with Arbitrary Finite Domains (CT-RSA 2002), "Cycle-Walking Cipher" and
/// "Generalized-Feistel Cipher".
class Permutation {
 public:
  /// `key` chooses the permutation; size >= 1.
  Permutation(int64_t size, uint64_t key);
  /// The image of index, 0 <= index < size.
  int64_t operator()(int64_t index) const;

 private:
  uint64_t pass(uint64_t value) const;

  uint64_t size_;
  uint64_t key_;
  int half_bits_;
};

/// Places [first, first + count) of an endless pass over `rows`, every epoch in a permutation of its own: a pure
/// function, so a step's batch needs no state.
std::vector<int64_t> batch_of(const std::vector<int64_t>& rows, uint64_t seed, int64_t first, int64_t count);

}  // namespace moraine::data
