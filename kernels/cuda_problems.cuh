#pragma once

#include "kernels/cuda_gemm.cuh"
#include "kernels/route.h"

/// The three ragged products as Problems of cuda_gemm.cuh. Shrink and expand overwrite their outputs, expand except
/// where an earlier term already stands in its rows; outer overwrites or accumulates.
namespace moraine::kernels::device {

constexpr int64_t kSplitChunk = 512;  // columns of a shrink's partial sums; fixed, so that splitting changes no bits

// The parts of a route and its segments that device code reads.
struct Ragged {
  const int32_t *perm, *inverse, *offsets, *status;
  const int64_t *row_offsets, *pair_offsets;
  int64_t pairs, slots;
  int experts;

  __device__ int64_t rank(int e) const { return row_offsets[e + 1] - row_offsets[e]; }
  __device__ int expert_at(int64_t s) const { return expert_of_tile(offsets, experts, static_cast<int32_t>(s)); }
  __device__ float poison() const { return *status == 0 ? 0.0f : nanf(""); }
};
Ragged ragged(const Route& r, const Segments& s) {
  return {r.perm,    r.inverse,     r.offsets,
          r.status,  s.row_offsets, s.pair_offsets,
          r.pairs(), r.slots,       static_cast<int>(r.experts)};
}

// planes[split][pair element] = partial <x_p, matrix row>, over the split's chunks.
template <class T>
struct ShrinkProblem {
  static constexpr bool kLeftByDepth = false, kRightByDepth = false;
  static constexpr int kChunk = kSplitChunk;
  struct Tile {
    int64_t depth_begin, depth_end, rows, columns, left_width;
    int expert;
    int64_t first_row, first_rank, split;
  };
  Ragged g;
  const int32_t* table;
  const T* x;
  int64_t ld, divisor;
  const T* matrix;
  int64_t width, splits, split_width;
  float* planes;
  int64_t plane_stride;

  __device__ const T* anywhere() const { return x; }
  __device__ int64_t tiles() const { return table[g.experts] * splits; }
  __device__ Tile open(int64_t index) const {
    Tile t{};
    t.split = index % splits;
    const auto tile = static_cast<int32_t>(index / splits);
    t.expert = expert_of_tile(table, g.experts, tile);
    const int64_t rank = g.rank(t.expert), rank_tiles = ceil_div(rank, kBlock), local = tile - table[t.expert];
    const int64_t n = g.offsets[t.expert + 1] - g.offsets[t.expert];
    t.first_row = local / rank_tiles * kBlock,
    t.first_rank = local % rank_tiles * kBlock;  // ranks innermost: x stays in L2
    t.rows = n - t.first_row < kBlock ? n - t.first_row : kBlock;
    t.columns = rank - t.first_rank < kBlock ? rank - t.first_rank : kBlock;
    t.depth_begin = t.split * split_width;
    t.depth_end = t.depth_begin + split_width < width ? t.depth_begin + split_width : width;
    return t;
  }
  __device__ const T* left(const Tile& t, int64_t row) const {
    return x + g.perm[g.offsets[t.expert] + t.first_row + row] / divisor * ld;
  }
  __device__ const T* right(const Tile& t, int64_t row) const {
    return matrix + (g.row_offsets[t.expert] + t.first_rank + row) * width;
  }
  __device__ void store(const Tile& t, int row, int column, float value) const {
    const int64_t ld_pairs = padded_rank(g.rank(t.expert));
    planes[t.split * plane_stride + g.pair_offsets[t.expert] + (t.first_row + row) * ld_pairs + t.first_rank + column] =
        value;
  }
};

// What becomes of an expanded element: pair rows in float (added to an earlier term's where there is one), or the
// activation input base + scale * value in the storage type.
template <class T>
struct ExpandProblem {
  static constexpr bool kLeftByDepth = false, kRightByDepth = true;
  static constexpr int kChunk = 0;
  struct Tile {
    int64_t depth_begin, depth_end, rows, columns, left_width;
    int expert;
    int64_t first_row, first_column;
  };
  Ragged g;
  const int32_t* table;
  const T* pairs;
  const T* matrix;
  int64_t width;
  float* rows_out;                  // [P, width], null with an activation
  const int64_t* previous_offsets;  // row offsets of the term already in rows_out, or null
  T* activation;                    // [P, width]
  const T* base;                    // [T, base_ld]
  int64_t base_ld;
  const float* scale;

  __device__ const T* anywhere() const { return matrix; }
  __device__ int64_t tiles() const { return table[g.experts] * ceil_div(width, kBlock); }
  __device__ Tile open(int64_t index) const {
    Tile t{};
    const int64_t column_tiles = ceil_div(width, kBlock);
    const auto tile = static_cast<int32_t>(index / column_tiles);  // columns innermost: the pair rows stay in L2
    t.expert = expert_of_tile(table, g.experts, tile);
    const int64_t n = g.offsets[t.expert + 1] - g.offsets[t.expert];
    t.first_row = static_cast<int64_t>(tile - table[t.expert]) * kBlock;
    t.first_column = index % column_tiles * kBlock;
    t.rows = n - t.first_row < kBlock ? n - t.first_row : kBlock;
    t.columns = width - t.first_column < kBlock ? width - t.first_column : kBlock;
    t.depth_end = g.rank(t.expert);
    return t;
  }
  __device__ const T* left(const Tile& t, int64_t row) const {
    return pairs + g.pair_offsets[t.expert] + (t.first_row + row) * padded_rank(g.rank(t.expert));
  }
  __device__ const T* right(const Tile& t, int64_t k) const {
    return matrix + (g.row_offsets[t.expert] + k) * width + t.first_column;
  }
  __device__ void store(const Tile& t, int row, int column, float value) const {
    const int64_t p = g.perm[g.offsets[t.expert] + t.first_row + row], at = p * width + t.first_column + column;
    if (rows_out != nullptr) {
      const bool add = previous_offsets != nullptr && previous_offsets[t.expert + 1] > previous_offsets[t.expert];
      rows_out[at] = add ? rows_out[at] + value : value;
    } else {
      activation[at] =
          from_float<T>(fmaf(scale[t.expert], value, to_float(base[p / g.slots * base_ld + t.first_column + column])));
    }
  }
};

template <class T>
struct OuterProblem {
  static constexpr bool kLeftByDepth = true, kRightByDepth = true;
  static constexpr int kChunk = 0;
  struct Tile {
    int64_t depth_begin, depth_end, rows, columns, left_width;
    int expert;
    int64_t first_rank, first_column;
  };
  Ragged g;
  const int32_t* table;
  const T* pairs;
  const T* rows;
  int64_t ld, divisor, width;
  float* out;
  bool accumulate;

  __device__ const T* anywhere() const { return rows; }
  __device__ int64_t tiles() const { return table[g.experts] * ceil_div(width, kBlock); }
  __device__ Tile open(int64_t index) const {
    Tile t{};
    const int64_t column_tiles = ceil_div(width, kBlock);
    const auto tile = static_cast<int32_t>(index / column_tiles);
    t.expert = expert_of_tile(table, g.experts, tile);
    t.first_rank = static_cast<int64_t>(tile - table[t.expert]) * kBlock;
    t.first_column = index % column_tiles * kBlock;
    const int64_t rank = g.rank(t.expert);
    t.rows = t.left_width = rank - t.first_rank < kBlock ? rank - t.first_rank : kBlock;
    t.columns = width - t.first_column < kBlock ? width - t.first_column : kBlock;
    t.depth_end = g.offsets[t.expert + 1] - g.offsets[t.expert];  // 0: the tile is still written, as zeros
    return t;
  }
  __device__ const T* left(const Tile& t, int64_t k) const {
    return pairs + g.pair_offsets[t.expert] + k * padded_rank(g.rank(t.expert)) + t.first_rank;
  }
  __device__ const T* right(const Tile& t, int64_t k) const {
    return rows + g.perm[g.offsets[t.expert] + k] / divisor * ld + t.first_column;
  }
  __device__ void store(const Tile& t, int row, int column, float value) const {
    float& to = out[(g.row_offsets[t.expert] + t.first_rank + row) * width + t.first_column + column];
    to = (accumulate ? to + value : value) + g.poison();
  }
};

}  // namespace moraine::kernels::device
