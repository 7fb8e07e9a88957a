#pragma once

#include <cstdint>

/// Index arithmetic shared by the CPU and CUDA kernels and tested on the CPU: pair-buffer offsets and tile tables.
#if defined(__CUDACC__)
#define MORAINE_HD __host__ __device__
#else
#define MORAINE_HD
#endif

namespace moraine::kernels {

/// Row length of a pair buffer for one expert: its rank rounded up to 8 elements (16 bytes of a 16-bit type).
MORAINE_HD inline int64_t padded_rank(int64_t rank) { return (rank + 7) / 8 * 8; }

MORAINE_HD inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Elements any pair buffer of P pairs can need, known before the route is.
MORAINE_HD inline int64_t pair_buffer_bound(int64_t pairs, int64_t max_rank) { return pairs * padded_rank(max_rank); }

/// Offsets of one projection under one route. A pair buffer holds expert e's n_e rows of padded_rank(r_e) elements from
/// pair_offsets[e] on, in sorted order; columns from r_e on are zero.
struct Segments {
  const int64_t* row_offsets = nullptr;   // [E+1] first weight row of expert e
  const int64_t* pair_offsets = nullptr;  // [E+1] first pair-buffer element of expert e
  // Tile tables of the CUDA kernels, [E+1] prefix sums; null on the CPU.
  const int32_t* shrink_tiles = nullptr;  // token tiles x rank tiles
  const int32_t* expand_tiles = nullptr;  // token tiles (of experts with a rank)
  const int32_t* outer_tiles = nullptr;   // rank tiles
  int64_t max_rank = 0;
};

/// Expert that owns tile `tile` of a prefix table: the last e with base[e] <= tile. Experts without tiles are skipped.
/// Needs tile < base[experts].
MORAINE_HD inline int expert_of_tile(const int32_t* base, int experts, int32_t tile) {
  int low = 0, high = experts;  // invariant: base[low] <= tile < base[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (base[middle] <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

/// Tiles of one expert with n pairs and rank r, for tiles of `block` x `block`.
MORAINE_HD inline int32_t shrink_tile_count(int64_t n, int64_t r, int block) {
  return static_cast<int32_t>(ceil_div(n, block) * ceil_div(r, block));
}
MORAINE_HD inline int32_t expand_tile_count(int64_t n, int64_t r, int block) {
  return r == 0 ? 0 : static_cast<int32_t>(ceil_div(n, block));
}
/// Experts without pairs keep their tiles: their gradients must be written as zero.
MORAINE_HD inline int32_t outer_tile_count(int64_t r, int block) { return static_cast<int32_t>(ceil_div(r, block)); }

}  // namespace moraine::kernels
