#pragma once

#include "kernels/cuda_device.cuh"
#include "kernels/layout.h"

/// One 64 x 64 output tile per block of 128 threads, for the three products over ragged segments. 16-bit types use
/// mma.sync m16n8k16, float plain FMA (no TF32); accumulators are float. Operands stream through a three-stage cp.async
/// pipeline in XOR-swizzled shared memory (48 KB). Grids are persistent: block i takes tiles i, i + gridDim, ..; every
/// output element belongs to one block, there are no atomics.
///
/// A Problem provides: kLeftByDepth, kRightByDepth (operand stored [k][m] / [k][n] instead of [m][k] / [n][k]), kChunk
/// (elements of k after which partial sums are added to the total, 0: never), tiles(), open(tile) -> Tile with the
/// valid extents, row pointers of both operands, row() -> Row of the output, and store().
namespace moraine::kernels::device {

constexpr int kBlock = 64;
constexpr int kThreads = 128;
constexpr int kStages = 3;

template <class T>
struct TileShape {
  static constexpr int kPerChunk = 16 / static_cast<int>(sizeof(T));     // elements of one 16-byte copy
  static constexpr int kDepth = 128 / static_cast<int>(sizeof(T));       // k per stage: 64 of 16 bits, 32 floats
  static constexpr int kOperand = kBlock * kDepth;                       // elements of one operand's stage
  static constexpr size_t kShared = 2 * kStages * kOperand * sizeof(T);  // 48 KB
};

/// Position of (row, column) in a stage of `columns` elements per row; 16-byte chunks are permuted within eight.
template <class T>
MORAINE_HD inline int swizzled(int row, int column, int columns) {
  constexpr int kPer = 16 / static_cast<int>(sizeof(T));
  return row * columns + (((column / kPer) ^ (row & 7)) * kPer) + column % kPer;
}

/// Output coordinates of accumulator (mi, ni, i) of a thread, in the layout of mma.m16n8k16: 2 x 2 warps of 32 x 32.
MORAINE_HD inline int fragment_row(int thread, int mi, int i) {
  return (thread / 64) * 32 + mi * 16 + (i / 2) * 8 + (thread % 32) / 4;
}
MORAINE_HD inline int fragment_column(int thread, int ni, int i) {
  return (thread / 32 % 2) * 32 + ni * 8 + (thread % 4) * 2 + i % 2;
}

// rows x columns of one operand stage. row_of(row) gives the start of a row, valid(row) how many elements exist from
// `first` on; what does not exist becomes zero, also when its neighbour in memory is NaN.
template <class T, class RowOf, class Valid>
__device__ inline void load_stage(T* to, int rows, int columns, const T* anywhere, RowOf row_of, Valid valid) {
  constexpr int kPer = TileShape<T>::kPerChunk;
  const int per_row = columns / kPer;
  for (int i = static_cast<int>(threadIdx.x); i < rows * per_row; i += kThreads) {
    const int row = i / per_row, column = i % per_row * kPer;
    const int64_t left = valid(row) - column;
    const int bytes = left >= kPer ? 16 : left > 0 ? static_cast<int>(left) * static_cast<int>(sizeof(T)) : 0;
    copy_async(to + swizzled<T>(row, column, columns), bytes > 0 ? row_of(row) + column : anywhere, bytes);
  }
}

template <class T, bool kLeftByDepth, bool kRightByDepth>
__device__ inline void multiply_stage(const T* left, const T* right, float (&acc)[2][4][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int m0 = warp / 2 * 32, n0 = warp % 2 * 32;
  constexpr int kDepth = TileShape<T>::kDepth;
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t a[2][4], b[4][2];
#pragma unroll
    for (int mi = 0; mi < 2; ++mi) {
      const int m = m0 + mi * 16;
      if constexpr (kLeftByDepth) {
        const int row = k + lane % 8 + lane / 16 * 8, column = m + lane / 8 % 2 * 8;
        load_matrices_transposed(a[mi], left + swizzled<T>(row, column, kBlock));
      } else {
        load_matrices(a[mi], left + swizzled<T>(m + lane % 16, k + lane / 16 * 8, kDepth));
      }
    }
#pragma unroll
    for (int ni = 0; ni < 4; ni += 2) {
      const int n = n0 + ni * 8;
      uint32_t r[4];
      if constexpr (kRightByDepth) {
        const int row = k + lane % 8 + lane / 8 % 2 * 8, column = n + lane / 16 * 8;
        load_matrices_transposed(r, right + swizzled<T>(row, column, kBlock));
      } else {
        load_matrices(r, right + swizzled<T>(n + lane % 8 + lane / 16 * 8, k + lane / 8 % 2 * 8, kDepth));
      }
      b[ni][0] = r[0], b[ni][1] = r[1], b[ni + 1][0] = r[2], b[ni + 1][1] = r[3];
    }
#pragma unroll
    for (int mi = 0; mi < 2; ++mi)
#pragma unroll
      for (int ni = 0; ni < 4; ++ni) multiply_add(acc[mi][ni], a[mi], b[ni], T{});
  }
}

// float: the same fragments by plain FMA, one chain over k.
template <bool kLeftByDepth, bool kRightByDepth>
__device__ inline void multiply_stage_float(const float* left, const float* right, float (&acc)[2][4][4]) {
  const int thread = static_cast<int>(threadIdx.x);
  constexpr int kDepth = TileShape<float>::kDepth;
#pragma unroll 4
  for (int k = 0; k < kDepth; ++k) {
    float a[2][2], b[4][2];
#pragma unroll
    for (int mi = 0; mi < 2; ++mi)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int m = fragment_row(thread, mi, 2 * i);
        a[mi][i] = left[kLeftByDepth ? swizzled<float>(k, m, kBlock) : swizzled<float>(m, k, kDepth)];
      }
#pragma unroll
    for (int ni = 0; ni < 4; ++ni)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int n = fragment_column(thread, ni, i);
        b[ni][i] = right[kRightByDepth ? swizzled<float>(k, n, kBlock) : swizzled<float>(n, k, kDepth)];
      }
#pragma unroll
    for (int mi = 0; mi < 2; ++mi)
#pragma unroll
      for (int ni = 0; ni < 4; ++ni)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[mi][ni][i] = fmaf(a[mi][i / 2], b[ni][i % 2], acc[mi][ni][i]);
  }
}

template <class T, class Problem>
__device__ inline void load_operands(const Problem& problem, const typename Problem::Tile& tile, int64_t k, T* left,
                                     T* right) {
  constexpr int kDepth = TileShape<T>::kDepth;
  const int64_t depth_left = tile.depth_end - k;
  if constexpr (Problem::kLeftByDepth) {
    load_stage(
        left, kDepth, kBlock, problem.anywhere(), [&](int row) { return problem.left(tile, k + row); },
        [&](int row) { return row < depth_left ? tile.rows : int64_t{0}; });
  } else {
    load_stage(
        left, kBlock, kDepth, problem.anywhere(), [&](int row) { return problem.left(tile, row) + k; },
        [&](int row) { return row < tile.rows ? depth_left : int64_t{0}; });
  }
  if constexpr (Problem::kRightByDepth) {
    load_stage(
        right, kDepth, kBlock, problem.anywhere(), [&](int row) { return problem.right(tile, k + row); },
        [&](int row) { return row < depth_left ? tile.columns : int64_t{0}; });
  } else {
    load_stage(
        right, kBlock, kDepth, problem.anywhere(), [&](int row) { return problem.right(tile, row) + k; },
        [&](int row) { return row < tile.columns ? depth_left : int64_t{0}; });
  }
}

template <class T, class Problem>
__global__ void __launch_bounds__(kThreads) tile_kernel(Problem problem, const int32_t* table) {
  MORAINE_DYNAMIC_SHARED(shared);
  using Shape = TileShape<T>;
  T* const left = reinterpret_cast<T*>(shared);
  T* const right = left + kStages * Shape::kOperand;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t tiles = problem.tiles(table, kBlock);
  for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const typename Problem::Tile tile = problem.open(table, index, kBlock, kBlock);
    const int steps = static_cast<int>(ceil_div(tile.depth_end - tile.depth_begin, Shape::kDepth));
    const auto load = [&](int step) {
      if (step < steps)
        load_operands<T>(problem, tile, tile.depth_begin + static_cast<int64_t>(step) * Shape::kDepth,
                         left + step % kStages * Shape::kOperand, right + step % kStages * Shape::kOperand);
      commit_copies();  // also when empty, so that the group count stays in step
    };
    float acc[2][4][4] = {}, total[2][4][4] = {};
    for (int step = 0; step < kStages - 1; ++step) load(step);
    for (int step = 0; step < steps; ++step) {
      wait_copies<kStages - 2>();
      __syncthreads();
      load(step + kStages - 1);
      const T* l = left + step % kStages * Shape::kOperand;
      const T* r = right + step % kStages * Shape::kOperand;
      if constexpr (sizeof(T) == 4) {
        multiply_stage_float<Problem::kLeftByDepth, Problem::kRightByDepth>(l, r, acc);
      } else {
        multiply_stage<T, Problem::kLeftByDepth, Problem::kRightByDepth>(l, r, acc);
      }
      if constexpr (Problem::kChunk > 0) {
        if ((step + 1) % (Problem::kChunk / Shape::kDepth) == 0 || step + 1 == steps) {
#pragma unroll
          for (int mi = 0; mi < 2; ++mi)
#pragma unroll
            for (int ni = 0; ni < 4; ++ni)
#pragma unroll
              for (int i = 0; i < 4; ++i) total[mi][ni][i] += acc[mi][ni][i], acc[mi][ni][i] = 0;
        }
      }
    }
    wait_copies<0>();
    __syncthreads();  // the next tile overwrites the stages
#pragma unroll
    for (int mi = 0; mi < 2; ++mi)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = fragment_row(thread, mi, 2 * half);
        if (row >= tile.rows) continue;
        const typename Problem::Row to = problem.row(tile, row);
#pragma unroll
        for (int ni = 0; ni < 4; ++ni)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            const int column = fragment_column(thread, ni, i);
            if (column < tile.columns)
              problem.store(to, column, Problem::kChunk > 0 ? total[mi][ni][i] : acc[mi][ni][i]);
          }
      }
  }
}

}  // namespace moraine::kernels::device
