#pragma once

#include "kernels/cuda_device.cuh"
#include "kernels/cuda_problems.cuh"
#include "kernels/layout.h"

/// Large output tiles for 16-bit types by wgmma (sm_90a): 128 x 128 for a product with chunked sums, whose total needs
/// the registers, 128 x 256 otherwise. Blocks of 384 threads, one per multiprocessor and persistent: warpgroup 0 fills
/// a ring of stages of 64 k with cp.async (rows are gathered, so the bulk copy engine cannot; it could fetch the
/// weights), warpgroups 1 and 2 multiply 64 rows each. Every output element belongs to one thread, k runs in order,
/// partial sums as in cuda_gemm.cuh.
///
/// Shared memory: an operand's stage is a row of 64 x 64 blocks of 8 KB, each 64 rows of 128 bytes with their eight
/// 16-byte chunks permuted by row & 7: the 128-byte swizzle. Rows are m or n (64 k across) or, where the operand is
/// stored by depth, k (64 of m or n across).
///
/// Ring: full[s] completes when all producers' copies of stage s have landed, empty[s] when all consumer warps are done
/// reading it. wgmma reads through the async proxy and cp.async writes through the generic one. fence.proxy.async
/// orders only what its own thread has finished, and a copy is finished for certain once its thread has waited for it.
/// So a producer waits for its copies, fences, then arrives; arriving by cp.async.mbarrier.arrive would pass the fence
/// by. To keep copies under way, stage c is published only after stage c + kAhead has been issued; kAhead <= stages - 2
/// leaves consumers one published stage while the producer waits for the oldest to be emptied. The way back needs no
/// fence: the end of a wgmma includes one.
namespace moraine::kernels::device {

constexpr int kWgmmaRows = 128;
constexpr int kWgmmaDepth = 64;
constexpr int kWgmmaThreads = 384;
constexpr int kWgmmaBlockElements = 64 * 64;
constexpr int kWgmmaBlockBytes = 2 * kWgmmaBlockElements;

template <class Problem>
struct WgmmaShape {
  static constexpr int kRows = kWgmmaRows;
  static constexpr int kColumns = Problem::kChunk > 0 ? 128 : 256;
  static constexpr int kStages = kColumns == 128 ? 6 : 4;
  static constexpr int kAhead = kStages - 2;
  static constexpr int kLeft = kRows * kWgmmaDepth, kRight = kColumns * kWgmmaDepth;  // elements of a stage
  // Stages begin at multiples of 1024 bytes, where the swizzle's pattern does; the barriers follow.
  static constexpr size_t kShared = 1024 + 2 * kStages * (kLeft + kRight) + 2 * kStages * sizeof(uint64_t);
};

/// Shared-memory matrix descriptor of an operand from `address` on, in the layout above. Between 8 rows lie 1024 bytes
/// (stride); between 64-wide blocks of an operand stored by depth lies a block (leading offset, unused otherwise).
__device__ inline uint64_t wgmma_descriptor(uint32_t address, bool by_depth) {
  const uint64_t leading = by_depth ? kWgmmaBlockBytes >> 4 : 1, stride = 1024 >> 4, swizzle_128 = 1;
  return ((address & 0x3ffff) >> 4) | leading << 16 | stride << 32 | swizzle_128 << 62;
}
/// What a step of 16 k adds to a descriptor: 32 bytes within the rows, or 16 rows.
MORAINE_HD constexpr uint64_t wgmma_step(bool by_depth) { return (by_depth ? 16 * 128 : 32) >> 4; }

/// One thread's share of filling an operand's stage: chunk thread % 8 of rows thread / 8 + 16 i.
template <class T>
struct StageWriter {
  int chunk = static_cast<int>(threadIdx.x) % 8, row = static_cast<int>(threadIdx.x) / 8;

  // Elements that do not exist become zero, also where their neighbour in memory is NaN.
  __device__ void copy(T* stage, int block_row, const T* from, int64_t left) const {
    const int bytes = left >= 8 ? 16 : left > 0 ? static_cast<int>(left) * 2 : 0;
    copy_async(stage + block_row * 64 + (chunk ^ (block_row & 7)) * 8, from, bytes);
  }

  // Operand stored by depth: 64 rows of k, `extent` valid columns.
  template <int kColumns, class RowOf>
  __device__ void by_depth(T* stage, const T* anywhere, int64_t depth_left, int64_t extent, RowOf row_of) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int k = row + 16 * i;
      const bool exists = k < depth_left;
      const T* from = exists ? row_of(k) : anywhere;
#pragma unroll
      for (int block = 0; block < kColumns / 64; ++block) {
        const int column = 64 * block + 8 * chunk;
        const int64_t left = exists ? extent - column : 0;
        copy(stage + block * kWgmmaBlockElements, k, left > 0 ? from + column : anywhere, left);
      }
    }
  }

  // The other: kRows rows at `rows`, null where there is none, of which `depth_left` elements from k on are valid.
  template <int kRows>
  __device__ void by_extent(T* stage, const T* anywhere, const T* const (&rows)[kRows / 16], int64_t k,
                            int64_t depth_left) const {
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i) {
      const int64_t left = rows[i] != nullptr ? depth_left - 8 * chunk : 0;
      copy(stage, row + 16 * i, left > 0 ? rows[i] + k + 8 * chunk : anywhere, left);
    }
  }
};

template <class T, class Problem>
struct WgmmaRing {
  using Shape = WgmmaShape<Problem>;
  T *left, *right;
  uint64_t *full, *empty;
  uint32_t count = 0;  // stages passed, over all tiles

  __device__ explicit WgmmaRing(unsigned char* shared) {
    unsigned char* aligned = shared + (1024 - shared_address(shared) % 1024) % 1024;
    left = reinterpret_cast<T*>(aligned);
    right = left + Shape::kStages * Shape::kLeft;
    full = reinterpret_cast<uint64_t*>(right + Shape::kStages * Shape::kRight);
    empty = full + Shape::kStages;
  }
  __device__ static uint32_t slot(uint32_t stage) { return stage % Shape::kStages; }
  __device__ static uint32_t parity(uint32_t stage) { return stage / Shape::kStages % 2; }
};

template <class T, class Problem>
__device__ inline void wgmma_produce(const Problem& problem, const int32_t* table, WgmmaRing<T, Problem> ring) {
  using Shape = WgmmaShape<Problem>;
  const StageWriter<T> writer;
  const T* const anywhere = problem.anywhere();
  const int64_t tiles = problem.tiles(table, Shape::kColumns);
  uint32_t published = 0;
  const auto publish = [&] {
    fence_async_proxy();
    barrier_arrive(ring.full + ring.slot(published++));
  };
  for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const typename Problem::Tile tile = problem.open(table, index, Shape::kRows, Shape::kColumns);
    const T *left_rows[Shape::kRows / 16], *right_rows[Shape::kColumns / 16];
    if constexpr (!Problem::kLeftByDepth) {
#pragma unroll
      for (int i = 0; i < Shape::kRows / 16; ++i)
        left_rows[i] = writer.row + 16 * i < tile.rows ? problem.left(tile, writer.row + 16 * i) : nullptr;
    }
    if constexpr (!Problem::kRightByDepth) {
#pragma unroll
      for (int i = 0; i < Shape::kColumns / 16; ++i)
        right_rows[i] = writer.row + 16 * i < tile.columns ? problem.right(tile, writer.row + 16 * i) : nullptr;
    }
    for (int64_t k = tile.depth_begin; k < tile.depth_end; k += kWgmmaDepth) {
      const uint32_t slot = ring.slot(ring.count);
      barrier_wait(ring.empty + slot, ring.parity(ring.count) ^ 1);  // the first round finds them empty
      T *left = ring.left + slot * Shape::kLeft, *right = ring.right + slot * Shape::kRight;
      const int64_t depth_left = tile.depth_end - k;
      if constexpr (Problem::kLeftByDepth) {
        writer.template by_depth<Shape::kRows>(left, anywhere, depth_left, tile.rows,
                                               [&](int row) { return problem.left(tile, k + row); });
      } else {
        writer.template by_extent<Shape::kRows>(left, anywhere, left_rows, k, depth_left);
      }
      if constexpr (Problem::kRightByDepth) {
        writer.template by_depth<Shape::kColumns>(right, anywhere, depth_left, tile.columns,
                                                  [&](int row) { return problem.right(tile, k + row); });
      } else {
        writer.template by_extent<Shape::kColumns>(right, anywhere, right_rows, k, depth_left);
      }
      commit_copies();
      ++ring.count;
      if (ring.count - published > Shape::kAhead) {
        wait_copies<Shape::kAhead>();
        publish();
      }
    }
  }
  wait_copies<0>();
  while (published < ring.count) publish();
}

template <class T, class Problem>
__device__ inline void wgmma_consume(const Problem& problem, const int32_t* table, WgmmaRing<T, Problem> ring) {
  using Shape = WgmmaShape<Problem>;
  constexpr int kPerThread = Shape::kColumns / 2;
  const int group = static_cast<int>(threadIdx.x) / 128 - 1, lane = static_cast<int>(threadIdx.x) % 32;
  const int first_row = 64 * group + static_cast<int>(threadIdx.x) / 32 % 4 * 16 + lane / 4;
  const uint64_t left = wgmma_descriptor(shared_address(ring.left) + static_cast<uint32_t>(group * kWgmmaBlockBytes),
                                         Problem::kLeftByDepth);
  const uint64_t right = wgmma_descriptor(shared_address(ring.right), Problem::kRightByDepth);
  const auto release = [&](uint32_t stage) {
    if (lane == 0) barrier_arrive(ring.empty + ring.slot(stage));
  };
  const int64_t tiles = problem.tiles(table, Shape::kColumns);
  for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const typename Problem::Tile tile = problem.open(table, index, Shape::kRows, Shape::kColumns);
    const int steps = static_cast<int>(ceil_div(tile.depth_end - tile.depth_begin, kWgmmaDepth));
    float acc[kPerThread], total[Problem::kChunk > 0 ? kPerThread : 1];
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      acc[i] = 0;
      if constexpr (Problem::kChunk > 0) total[i] = 0;
    }
    for (int done = 0; done < steps;) {
      const int end = Problem::kChunk > 0 && done + Problem::kChunk / kWgmmaDepth < steps
                          ? done + Problem::kChunk / kWgmmaDepth
                          : steps;
      for (bool first = true; done < end; ++done, first = false) {
        const uint32_t slot = ring.slot(ring.count);
        barrier_wait(ring.full + slot, ring.parity(ring.count));
        const uint64_t l = left + slot * (2 * Shape::kLeft >> 4), r = right + slot * (2 * Shape::kRight >> 4);
        pin(acc);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kWgmmaDepth / 16; ++k)
          wgmma<Problem::kLeftByDepth, Problem::kRightByDepth>(acc, l + k * wgmma_step(Problem::kLeftByDepth),
                                                               r + k * wgmma_step(Problem::kRightByDepth), T{});
        wgmma_commit();
        wgmma_wait<1>();  // the step before this one
        if (!first) release(ring.count - 1);
        ++ring.count;
      }
      wgmma_wait<0>();
      pin(acc);
      release(ring.count - 1);
      if constexpr (Problem::kChunk > 0) {
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) total[i] += acc[i], acc[i] = 0;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + 8 * half;
      if (row >= tile.rows) continue;
      const typename Problem::Row to = problem.row(tile, row);
#pragma unroll
      for (int i = 2 * half; i < kPerThread; i += 4)
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const int column = i / 4 * 8 + lane % 4 * 2 + side;
          if (column < tile.columns) {
            if constexpr (Problem::kChunk > 0) {
              problem.store(to, column, total[i + side]);
            } else {
              problem.store(to, column, acc[i + side]);
            }
          }
        }
    }
  }
}

/// As tile_kernel, for 16-bit types; other architectures never select it.
template <class T, class Problem>
__global__ void __launch_bounds__(kWgmmaThreads, 1) wgmma_kernel(Problem problem, const int32_t* table) {
#if defined(MORAINE_SM90A)
  using Shape = WgmmaShape<Problem>;
  MORAINE_DYNAMIC_SHARED(shared);
  const WgmmaRing<T, Problem> ring(shared);
  if (threadIdx.x == 0) {
    for (int s = 0; s < Shape::kStages; ++s) {
      barrier_init(ring.full + s, 128);  // threads of the producer
      barrier_init(ring.empty + s, 8);   // warps of the consumers
    }
  }
  __syncthreads();
  // 384 threads enter with at most 168 registers; 56 + 2 x 224 is the same total.
  if (threadIdx.x < 128) {
    lower_registers<56>();
    wgmma_produce(problem, table, ring);
  } else {
    raise_registers<224>();
    wgmma_consume(problem, table, ring);
  }
#else
  static_cast<void>(problem), static_cast<void>(table);
  MORAINE_UNREACHABLE();
#endif
}

}  // namespace moraine::kernels::device
