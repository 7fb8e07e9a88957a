#include "data/permutation.h"

#include <bit>

#include <fmt/format.h>

#include "core/error.h"
#include "core/hash.h"

namespace moraine::data {

namespace {

constexpr uint64_t kRounds = 6;

uint64_t mix(uint64_t value) {
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9U;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EBU;
  return value ^ (value >> 31);
}

}  // namespace

Permutation::Permutation(int64_t size, uint64_t key) : size_(static_cast<uint64_t>(size)), key_(key) {
  MORAINE_CHECK(size >= 1, "data: permutation of {} elements", size);
  half_bits_ = (static_cast<int>(std::bit_width(size_ - 1)) + 1) / 2;
}

uint64_t Permutation::pass(uint64_t value) const {
  const uint64_t mask = (uint64_t{1} << half_bits_) - 1;
  uint64_t left = value >> half_bits_, right = value & mask;
  for (uint64_t round = 1; round <= kRounds; ++round) {
    const uint64_t next = left ^ (mix(right ^ mix(key_ + round * 0x9E3779B97F4A7C15U)) & mask);
    left = right;
    right = next;
  }
  return (left << half_bits_) | right;
}

int64_t Permutation::operator()(int64_t index) const {
  MORAINE_CHECK(index >= 0 && static_cast<uint64_t>(index) < size_, "data: index {} of a permutation of {}", index,
                size_);
  uint64_t value = static_cast<uint64_t>(index);
  do value = pass(value);
  while (value >= size_);
  return static_cast<int64_t>(value);
}

std::vector<int64_t> batch_of(const std::vector<int64_t>& rows, uint64_t seed, int64_t first, int64_t count) {
  const auto size = static_cast<int64_t>(rows.size());
  std::vector<int64_t> out;
  for (int64_t place = first; place < first + count;) {
    const int64_t epoch = place / size;
    const Permutation order(size, core::derive_seed(seed, fmt::format("shuffle/epoch{}", epoch)));
    for (; place < first + count && place / size == epoch; ++place)
      out.push_back(rows[static_cast<size_t>(order(place % size))]);
  }
  return out;
}

}  // namespace moraine::data
