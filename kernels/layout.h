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
  // The same for experts in large tiles, which then have none above; null where no expert takes them.
  const int32_t* large_shrink_tiles = nullptr;
  const int32_t* large_expand_tiles = nullptr;
  const int32_t* large_outer_tiles = nullptr;
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

/// Which experts take large tiles (wgmma): all three products of an expert are of one class.
struct LargeTiles {
  bool enabled = false;
  int64_t min_rank = 0, min_pairs = 0;
  MORAINE_HD bool takes(int64_t n, int64_t r) const { return enabled && r >= min_rank && n >= min_pairs; }
};

/// Prefix sums of one tile class, [E+1] each, to be filled.
struct TileTables {
  int block;  // rows of a tile, and columns of a shrink's
  int32_t *shrink, *expand, *outer;
};

/// Pair offsets [E+1] and the tables of both classes of a route whose expert e has pairs offsets[e] .. offsets[e+1].
MORAINE_HD inline void fill_tables(const int32_t* offsets, const int64_t* row_offsets, int experts,
                                   const LargeTiles& rule, int64_t* pair_offsets, const TileTables& small,
                                   const TileTables& large) {
  pair_offsets[0] = 0;
  small.shrink[0] = small.expand[0] = small.outer[0] = 0;
  large.shrink[0] = large.expand[0] = large.outer[0] = 0;
  const auto append = [](const TileTables& to, int e, bool here, int64_t n, int64_t r) {
    to.shrink[e + 1] = to.shrink[e] + (here ? shrink_tile_count(n, r, to.block) : 0);
    to.expand[e + 1] = to.expand[e] + (here ? expand_tile_count(n, r, to.block) : 0);
    to.outer[e + 1] = to.outer[e] + (here ? outer_tile_count(r, to.block) : 0);
  };
  for (int e = 0; e < experts; ++e) {
    const int64_t n = offsets[e + 1] - offsets[e], r = row_offsets[e + 1] - row_offsets[e];
    pair_offsets[e + 1] = pair_offsets[e] + n * padded_rank(r);
    append(small, e, !rule.takes(n, r), n, r);
    append(large, e, rule.takes(n, r), n, r);
  }
}

}  // namespace moraine::kernels
