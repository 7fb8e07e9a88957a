#pragma once

#include "kernels/cuda_device.cuh"
#include "kernels/layout.h"
#include "kernels/route.h"

/// The three ragged products as Problems of cuda_gemm.cuh and cuda_wgmma.cuh. Shrink and expand overwrite their
/// outputs, expand except where an earlier term already stands in its rows; outer overwrites or accumulates.
namespace moraine::kernels::device {

constexpr int64_t kSplitChunk = 512;  // columns of a shrink's partial sums; fixed, so that splitting changes no bits

// The parts of a route and its segments that device code reads.
struct Ragged {
  const int32_t *perm, *inverse, *offsets, *status;
  const int64_t *row_offsets, *pair_offsets;
  int64_t pairs, slots;
  int experts;

  __device__ int64_t rank(int e) const { return row_offsets[e + 1] - row_offsets[e]; }
  __device__ int64_t count(int e) const { return offsets[e + 1] - offsets[e]; }
  __device__ int expert_at(int64_t s) const { return expert_of_tile(offsets, experts, static_cast<int32_t>(s)); }
  __device__ float poison() const { return *status == 0 ? 0.0f : nanf(""); }
};
inline Ragged ragged(const Route& r, const Segments& s) {
  return {r.perm,    r.inverse,     r.offsets,
          r.status,  s.row_offsets, s.pair_offsets,
          r.pairs(), r.slots,       static_cast<int>(r.experts)};
}

__device__ inline int64_t at_most(int64_t n, int64_t limit) { return n < limit ? n : limit; }

// Tile sizes are the kernel's: rows x columns of output. left(), right() and row() take indices inside the tile.

// planes[split][pair element] = partial <x_p, matrix row>, over the split's chunks.
template <class T>
struct ShrinkProblem {
  static constexpr bool kLeftByDepth = false, kRightByDepth = false;
  static constexpr int kChunk = kSplitChunk;
  struct Tile {
    int64_t depth_begin, depth_end, rows, columns;
    int expert;
    int64_t first_row, first_rank, split;
  };
  using Row = float*;
  Ragged g;
  const T* x;
  int64_t ld;
  int divisor;
  const T* matrix;
  int64_t width, splits, split_width;
  float* planes;
  int64_t plane_stride;

  int64_t most_tiles(int64_t max_rank, int rows, int columns) const {
    return (ceil_div(g.pairs, rows) + g.experts) * ceil_div(max_rank, columns) * splits;
  }
  __device__ const T* anywhere() const { return x; }
  __device__ int64_t tiles(const int32_t* table, int) const { return table[g.experts] * splits; }
  __device__ Tile open(const int32_t* table, int64_t index, int rows, int columns) const {
    Tile t{};
    t.split = index % splits;
    const auto tile = static_cast<int32_t>(index / splits);
    t.expert = expert_of_tile(table, g.experts, tile);
    const int64_t rank = g.rank(t.expert), rank_tiles = ceil_div(rank, columns), local = tile - table[t.expert];
    t.first_row = local / rank_tiles * rows;
    t.first_rank = local % rank_tiles * columns;  // ranks innermost: x stays in L2
    t.rows = at_most(g.count(t.expert) - t.first_row, rows);
    t.columns = at_most(rank - t.first_rank, columns);
    t.depth_begin = t.split * split_width;
    t.depth_end = t.depth_begin + at_most(width - t.depth_begin, split_width);
    return t;
  }
  __device__ const T* left(const Tile& t, int64_t row) const {
    return x + static_cast<int64_t>(g.perm[g.offsets[t.expert] + t.first_row + row] / divisor) * ld;
  }
  __device__ const T* right(const Tile& t, int64_t row) const {
    return matrix + (g.row_offsets[t.expert] + t.first_rank + row) * width;
  }
  __device__ Row row(const Tile& t, int row) const {
    return planes + t.split * plane_stride + g.pair_offsets[t.expert] +
           (t.first_row + row) * padded_rank(g.rank(t.expert)) + t.first_rank;
  }
  __device__ void store(const Row& row, int column, float value) const { row[column] = value; }
};

// What becomes of an expanded element: pair rows in float (added to an earlier term's where there is one), or the
// activation input base + scale * value in the storage type.
template <class T>
struct ExpandProblem {
  static constexpr bool kLeftByDepth = false, kRightByDepth = true;
  static constexpr int kChunk = 0;
  struct Tile {
    int64_t depth_begin, depth_end, rows, columns;
    int expert;
    int64_t first_row, first_column;
  };
  struct Row {
    float* out;
    bool add;
    T* activation;
    const T* base;
    float scale;
  };
  Ragged g;
  const T* pairs;
  const T* matrix;
  int64_t width;
  float* rows_out;                  // [P, width], null with an activation
  const int64_t* previous_offsets;  // row offsets of the term already in rows_out, or null
  T* activation;                    // [P, width]
  const T* base;                    // [T, base_ld]
  int64_t base_ld;
  const float* scale;

  int64_t most_tiles(int64_t, int rows, int columns) const {
    return (ceil_div(g.pairs, rows) + g.experts) * ceil_div(width, columns);
  }
  __device__ const T* anywhere() const { return matrix; }
  __device__ int64_t tiles(const int32_t* table, int columns) const {
    return table[g.experts] * ceil_div(width, columns);
  }
  __device__ Tile open(const int32_t* table, int64_t index, int rows, int columns) const {
    Tile t{};
    const int64_t column_tiles = ceil_div(width, columns);
    const auto tile = static_cast<int32_t>(index / column_tiles);  // columns innermost: the pair rows stay in L2
    t.expert = expert_of_tile(table, g.experts, tile);
    t.first_row = static_cast<int64_t>(tile - table[t.expert]) * rows;
    t.first_column = index % column_tiles * columns;
    t.rows = at_most(g.count(t.expert) - t.first_row, rows);
    t.columns = at_most(width - t.first_column, columns);
    t.depth_end = g.rank(t.expert);
    return t;
  }
  __device__ const T* left(const Tile& t, int64_t row) const {
    return pairs + g.pair_offsets[t.expert] + (t.first_row + row) * padded_rank(g.rank(t.expert));
  }
  __device__ const T* right(const Tile& t, int64_t k) const {
    return matrix + (g.row_offsets[t.expert] + k) * width + t.first_column;
  }
  __device__ Row row(const Tile& t, int row) const {
    const int32_t p = g.perm[g.offsets[t.expert] + t.first_row + row];
    const int64_t at = p * width + t.first_column;
    if (rows_out != nullptr) {
      const bool add = previous_offsets != nullptr && previous_offsets[t.expert + 1] > previous_offsets[t.expert];
      return {rows_out + at, add, nullptr, nullptr, 0.0f};
    }
    return {nullptr, false, activation + at, base + p / g.slots * base_ld + t.first_column, scale[t.expert]};
  }
  __device__ void store(const Row& row, int column, float value) const {
    if (row.out != nullptr) {
      row.out[column] = row.add ? row.out[column] + value : value;
    } else {
      row.activation[column] = from_float<T>(fmaf(row.scale, value, to_float(row.base[column])));
    }
  }
};

template <class T>
struct OuterProblem {
  static constexpr bool kLeftByDepth = true, kRightByDepth = true;
  static constexpr int kChunk = 0;
  struct Tile {
    int64_t depth_begin, depth_end, rows, columns;
    int expert;
    int64_t first_rank, first_column;
  };
  struct Row {
    float* out;
    float poison;
  };
  Ragged g;
  const T* pairs;
  const T* source;  // rows by pair, gathered
  int64_t ld;
  int divisor;
  int64_t width;
  float* out;
  WeightGrads grads;

  int64_t most_tiles(int64_t max_rank, int rows, int columns) const {
    return g.experts * ceil_div(max_rank, rows) * ceil_div(width, columns);
  }
  __device__ const T* anywhere() const { return source; }
  __device__ int64_t tiles(const int32_t* table, int columns) const {
    return table[g.experts] * ceil_div(width, columns);
  }
  __device__ Tile open(const int32_t* table, int64_t index, int rows, int columns) const {
    Tile t{};
    const int64_t column_tiles = ceil_div(width, columns);
    const auto tile = static_cast<int32_t>(index / column_tiles);
    t.expert = expert_of_tile(table, g.experts, tile);
    t.first_rank = static_cast<int64_t>(tile - table[t.expert]) * rows;
    t.first_column = index % column_tiles * columns;
    t.rows = at_most(g.rank(t.expert) - t.first_rank, rows);
    t.columns = at_most(width - t.first_column, columns);
    t.depth_end = g.count(t.expert);
    if (t.depth_end == 0 && grads == WeightGrads::kChosenOnly) t.rows = 0;  // else the tile is still written, as zeros
    return t;
  }
  __device__ const T* left(const Tile& t, int64_t k) const {
    return pairs + g.pair_offsets[t.expert] + k * padded_rank(g.rank(t.expert)) + t.first_rank;
  }
  __device__ const T* right(const Tile& t, int64_t k) const {
    return source + static_cast<int64_t>(g.perm[g.offsets[t.expert] + k] / divisor) * ld + t.first_column;
  }
  __device__ Row row(const Tile& t, int row) const {
    return {out + (g.row_offsets[t.expert] + t.first_rank + row) * width + t.first_column, g.poison()};
  }
  __device__ void store(const Row& row, int column, float value) const {
    float& to = row.out[column];
    to = (grads == WeightGrads::kAccumulate ? to + value : value) + row.poison;
  }
};

}  // namespace moraine::kernels::device
