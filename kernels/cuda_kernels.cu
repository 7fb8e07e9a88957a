// CUDA backend: routing, the ragged products and everything elementwise around them.
//
// Grids: products run persistently (cuda_gemm.cuh), the rest one warp per pair or one block per token, both grid-stride.
// Outputs are overwritten (=) except outer with accumulate and dot, which are added to (+=) by their single owner. Nothing is
// allocated and nothing waits for the stream except where check_inputs asks for it; no floating-point atomics. Activations and
// weights must be 16-byte aligned with widths that are multiples of 8. Traffic: expand writes and combine reads 4 P width
// bytes of pair rows in scratch.
// Verified by running these kernels on the host, block by block, against the double oracle (tests/kernels); not yet run on a GPU.
#include <algorithm>
#include <cstdint>
#include <string>

#include "core/error.h"
#include "kernels/arena.h"
#include "kernels/backend.h"
#include "kernels/cuda_gemm.cuh"

namespace moraine::kernels {
namespace device {

constexpr int64_t kSplitChunk = 512;   // columns of a shrink's partial sums; fixed, so that splitting changes no bits
constexpr int64_t kSplitPairs = 1024;  // up to here a shrink is split over its chunks to fill the machine
constexpr int kRouteBlock = 256;

// ---- routing: a stable counting sort without atomics -----------------------------------------------------------------

// Bucket of a pair: its expert, E for empty slots and for indices out of range, which also raise the status.
__device__ inline int bucket_of(const int32_t* index, int64_t p, int64_t pairs, int experts, int32_t* status) {
  if (p >= pairs) return -1;
  const int32_t e = index[p];
  if (e < -1 || e >= experts) *status = 1;  // every writer writes the same value
  return e < 0 || e >= experts ? experts : e;
}

// counts[bucket * blocks + block] = pairs of the bucket in this block of kRouteBlock pairs.
__global__ void route_count(const int32_t* index, int64_t pairs, int experts, int blocks, int32_t* counts, int32_t* status) {
  __shared__ int buckets[kRouteBlock];
  const int thread = static_cast<int>(threadIdx.x);
  const int mine = bucket_of(index, static_cast<int64_t>(blockIdx.x) * kRouteBlock + thread, pairs, experts, status);
  buckets[thread] = mine;
  __syncthreads();
  int before = 0, after = 0;
  for (int i = 0; i < kRouteBlock; ++i) {
    before += buckets[i] == mine && i < thread;
    after += buckets[i] == mine && i > thread;
  }
  if (mine >= 0 && after == 0) counts[static_cast<int64_t>(mine) * blocks + blockIdx.x] = before + 1;
}

// Exclusive scan of counts in place by one block; offsets[e] = first position of expert e.
__global__ void route_scan(int32_t* counts, int64_t entries, int blocks, int experts, int32_t* offsets) {
  __shared__ int32_t sums[kRouteBlock];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t share = ceil_div(entries, kRouteBlock);
  const int64_t begin = thread * share < entries ? thread * share : entries;
  const int64_t end = begin + share < entries ? begin + share : entries;
  int32_t sum = 0;
  for (int64_t i = begin; i < end; ++i) sum += counts[i];
  sums[thread] = sum;
  __syncthreads();
  int32_t running = 0;
  for (int i = 0; i < thread; ++i) running += sums[i];
  for (int64_t i = begin; i < end; ++i) {
    const int32_t here = counts[i];
    counts[i] = running;
    if (i % blocks == 0 && i / blocks <= experts) offsets[i / blocks] = running;
    running += here;
  }
}

__global__ void route_scatter(const int32_t* index, int64_t pairs, int experts, int blocks, const int32_t* counts, int32_t* perm,
                              int32_t* inverse, int32_t* status) {
  __shared__ int buckets[kRouteBlock];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t p = static_cast<int64_t>(blockIdx.x) * kRouteBlock + thread;
  const int mine = bucket_of(index, p, pairs, experts, status);
  buckets[thread] = mine;
  __syncthreads();
  if (mine < 0) return;
  int32_t at = counts[static_cast<int64_t>(mine) * blocks + blockIdx.x];
  for (int i = 0; i < thread; ++i) at += buckets[i] == mine;
  perm[at] = static_cast<int32_t>(p);
  inverse[p] = mine == experts ? -1 : at;
}

// Pair-buffer offsets and tile tables; a few hundred experts at most, so one thread walks them.
__global__ void segment_tables(const int32_t* offsets, const int64_t* row_offsets, int experts, int64_t* pair_offsets,
                               int32_t* shrink_tiles, int32_t* expand_tiles, int32_t* outer_tiles) {
  if (threadIdx.x != 0) return;
  pair_offsets[0] = 0;
  shrink_tiles[0] = expand_tiles[0] = outer_tiles[0] = 0;
  for (int e = 0; e < experts; ++e) {
    const int64_t n = offsets[e + 1] - offsets[e], r = row_offsets[e + 1] - row_offsets[e];
    pair_offsets[e + 1] = pair_offsets[e] + n * padded_rank(r);
    shrink_tiles[e + 1] = shrink_tiles[e] + shrink_tile_count(n, r, kBlock);
    expand_tiles[e + 1] = expand_tiles[e] + expand_tile_count(n, r, kBlock);
    outer_tiles[e + 1] = outer_tiles[e] + outer_tile_count(r, kBlock);
  }
}

// ---- products ---------------------------------------------------------------------------------------------------------

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
  return {r.perm, r.inverse, r.offsets, r.status, s.row_offsets, s.pair_offsets, r.pairs(), r.slots, static_cast<int>(r.experts)};
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
    t.first_row = local / rank_tiles * kBlock, t.first_rank = local % rank_tiles * kBlock;  // ranks innermost: x stays in L2
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
    planes[t.split * plane_stride + g.pair_offsets[t.expert] + (t.first_row + row) * ld_pairs + t.first_rank + column] = value;
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
  float* rows_out;                 // [P, width], null with an activation
  const int64_t* previous_offsets; // row offsets of the term already in rows_out, or null
  T* activation;                   // [P, width]
  const T* base;                   // [T, base_ld]
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
      activation[at] = from_float<T>(fmaf(scale[t.expert], value, to_float(base[p / g.slots * base_ld + t.first_column + column])));
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

// ---- elementwise -------------------------------------------------------------------------------------------------------

constexpr int kRowThreads = 128;  // one warp per pair, or one block per token

// Calls body(sorted position, expert, pair, lane) for every pair of the grid's share.
template <class Body>
__device__ inline void for_each_pair(const Ragged& g, Body body) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kRowThreads / 32);
  const int64_t end = g.offsets[g.experts];
  for (int64_t s = static_cast<int64_t>(blockIdx.x) * (kRowThreads / 32) + threadIdx.x / 32; s < end; s += warps)
    body(s, g.expert_at(s), static_cast<int64_t>(g.perm[s]), lane);
}

// out = planes summed in order; pad columns zero.
template <class Out>
__global__ void sum_planes(Ragged g, const float* planes, int64_t plane_stride, int64_t splits, Out* out) {
  for_each_pair(g, [&](int64_t s, int e, int64_t, int lane) {
    const int64_t rank = g.rank(e), ld = padded_rank(rank), at = g.pair_offsets[e] + (s - g.offsets[e]) * ld;
    for (int64_t i = lane; i < ld; i += 32) {
      float sum = 0;
      for (int64_t split = 0; split < splits && i < rank; ++split) sum += planes[split * plane_stride + at + i];
      out[at + i] = from_float<Out>(sum);
    }
  });
}

template <class T, class Out>
__global__ void gather_pairs(Ragged g, const T* x, int64_t x_ld, int64_t divisor, Out* out) {
  for_each_pair(g, [&](int64_t s, int e, int64_t p, int lane) {
    const int64_t rank = g.rank(e), ld = padded_rank(rank), at = g.pair_offsets[e] + (s - g.offsets[e]) * ld;
    for (int64_t i = lane; i < ld; i += 32) out[at + i] = from_float<Out>(i < rank ? to_float(x[p / divisor * x_ld + i]) : 0.0f);
  });
}

// rows_out[p, :] (+)= the pair's own buffer: an expand by the identity.
template <class T>
__global__ void spread_pairs(Ragged g, const T* pairs, int64_t width, float* rows_out, const int64_t* previous_offsets) {
  for_each_pair(g, [&](int64_t s, int e, int64_t p, int lane) {
    const int64_t rank = g.rank(e), at = g.pair_offsets[e] + (s - g.offsets[e]) * padded_rank(rank);
    const bool add = previous_offsets != nullptr && previous_offsets[e + 1] > previous_offsets[e];
    for (int64_t i = lane; i < rank; i += 32) {
      float& to = rows_out[p * width + i];
      to = add ? to + to_float(pairs[at + i]) : to_float(pairs[at + i]);
    }
  });
}

template <class T>
__global__ void scale_pair_rows(Ragged g, const T* u, const float* v, const float* weights, const float* scale, T* out_u, T* out_v,
                                float* dot) {
  for_each_pair(g, [&](int64_t s, int e, int64_t p, int lane) {
    const int64_t ld = padded_rank(g.rank(e)), at = g.pair_offsets[e] + (s - g.offsets[e]) * ld;
    const float w = weights[p];
    float sum = 0;
    for (int64_t i = lane; i < ld; i += 32) {
      if (dot != nullptr) sum = fmaf(to_float(u[at + i]), v[at + i], sum);
      if (out_u != nullptr) out_u[at + i] = from_float<T>(w * to_float(u[at + i]));
      if (out_v != nullptr) out_v[at + i] = from_float<T>(w * v[at + i]);
    }
    if (dot != nullptr) {
      sum = warp_sum(sum);
      if (lane == 0 && ld > 0) dot[p] += scale[e] * sum;
    }
  });
}

__global__ void pair_weights(Ragged g, const float* gates, const float* scale, float* weighted, float* scaled) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t p = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; p < g.pairs; p += step) {
    const int32_t s = g.inverse[p];
    const float mine = s < 0 ? 0.0f : scale[g.expert_at(s)];
    scaled[p] = mine;
    weighted[p] = s < 0 ? 0.0f : gates[p] * mine;
  }
}

// y_t = y0_t + sum_j weights[p] rows[p]; pairs whose terms all have rank 0 are left out, so y is then y0 exactly.
template <class T>
__global__ void combine_rows(Ragged g, const int64_t* second_offsets, const float* rows, const float* weights, int64_t tokens,
                             int64_t width, const T* y0, int64_t y0_ld, T* y, int64_t y_ld) {
  const float poison = g.poison();
  for (int64_t t = blockIdx.x; t < tokens; t += gridDim.x)
    for (int64_t c = threadIdx.x; c < width; c += blockDim.x) {
      float sum = y0 == nullptr ? 0.0f : to_float(y0[t * y0_ld + c]);
      for (int64_t p = t * g.slots; p < (t + 1) * g.slots; ++p) {
        const int32_t s = g.inverse[p];
        if (s < 0) continue;
        const int e = g.expert_at(s);
        if (g.rank(e) == 0 && (second_offsets == nullptr || second_offsets[e + 1] == second_offsets[e])) continue;
        sum = weights == nullptr ? sum + rows[p * width + c] : fmaf(weights[p], rows[p * width + c], sum);
      }
      y[t * y_ld + c] = from_float<T>(poison == 0 ? sum : poison);
    }
}

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// h = silu(a) b and its gate-weighted sum; where a projection has rank 0, a (b) is still to be copied from its base.
template <class T>
__global__ void hidden_forward(Ragged g, const int64_t* up_offsets, const float* gates, const T* gate_base, int64_t gate_ld,
                               const T* up_base, int64_t up_ld, int64_t tokens, int64_t width, T* a, T* b, T* h, T* sum_out,
                               int64_t sum_ld) {
  const float poison = g.poison();
  for (int64_t t = blockIdx.x; t < tokens; t += gridDim.x)
    for (int64_t c = threadIdx.x; c < width; c += blockDim.x) {
      float sum = poison;
      for (int64_t p = t * g.slots; p < (t + 1) * g.slots; ++p) {
        const int32_t s = g.inverse[p];
        if (s < 0) continue;
        const int e = g.expert_at(s);
        const int64_t at = p * width + c;
        if (g.rank(e) == 0) a[at] = gate_base[t * gate_ld + c];
        if (up_offsets[e + 1] == up_offsets[e]) b[at] = up_base[t * up_ld + c];
        const float x = to_float(a[at]), hidden = x * sigmoid(x) * to_float(b[at]);
        h[at] = from_float<T>(hidden);
        sum = fmaf(gates[p], hidden, sum);
      }
      sum_out[t * sum_ld + c] = from_float<T>(sum);
    }
}

// One block per token; dot[p] += <h_p, q_t> by a fixed tree over the block.
template <class T>
__global__ void hidden_backward(Ragged g, const float* down_rows, const float* gates, const T* q, int64_t q_ld, int64_t tokens,
                                int64_t width, const T* a, const T* b, T* h, T* da, T* db, T* sum_a_out, int64_t sum_a_ld,
                                T* sum_b_out, int64_t sum_b_ld, float* dot) {
  __shared__ float partial[kRowThreads];
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t t = blockIdx.x; t < tokens; t += gridDim.x) {
    for (int64_t p = t * g.slots; p < (t + 1) * g.slots; ++p) {
      const int32_t s = g.inverse[p];
      if (s < 0) continue;
      const bool low_rank = g.rank(g.expert_at(s)) > 0;
      float sum = 0;
      for (int64_t c = thread; c < width; c += kRowThreads) {
        const int64_t at = p * width + c;
        const float x = to_float(a[at]), y = to_float(b[at]), upstream = to_float(q[t * q_ld + c]), sg = sigmoid(x);
        const float hidden = x * sg * y;
        const float dh = gates[p] * upstream + (low_rank ? down_rows[at] : 0.0f);
        sum = fmaf(hidden, upstream, sum);
        h[at] = from_float<T>(hidden);
        da[at] = from_float<T>(dh * y * sg * (1.0f + x * (1.0f - sg)));
        db[at] = from_float<T>(dh * x * sg);
      }
      partial[thread] = sum;
      __syncthreads();
      for (int half = kRowThreads / 2; half > 0; half /= 2) {
        if (thread < half) partial[thread] += partial[thread + half];
        __syncthreads();
      }
      if (thread == 0) dot[p] += partial[0];
      __syncthreads();
    }
    // Slot sums in float from the rounded da and db, converted once.
    for (int64_t c = thread; c < width; c += kRowThreads) {
      float sum_a = g.poison(), sum_b = sum_a;
      for (int64_t p = t * g.slots; p < (t + 1) * g.slots; ++p) {
        if (g.inverse[p] < 0) continue;
        sum_a += to_float(da[p * width + c]);
        sum_b += to_float(db[p * width + c]);
      }
      sum_a_out[t * sum_a_ld + c] = from_float<T>(sum_a);
      sum_b_out[t * sum_b_ld + c] = from_float<T>(sum_b);
    }
  }
}

template <class T>
__global__ void mask_ranks(int64_t count, float scale, const float* u, const float* v, const float* mask, T* masked_u, T* masked_v,
                           float* dmask) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const float m = mask[i];
    if (masked_u != nullptr) masked_u[i] = from_float<T>(m == 0 ? 0.0f : scale * u[i] * m);
    if (masked_v != nullptr) masked_v[i] = from_float<T>(m == 0 ? 0.0f : scale * v[i] * m);
    if (dmask != nullptr) dmask[i] = scale * u[i] * v[i];
  }
}

__global__ void find_not_finite(const float* x, int64_t n, int32_t* found) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step)
    if (!(fabsf(x[i]) <= 3.4e38f)) *found = 1;
}

}  // namespace device

namespace {

using namespace device;

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw core::Error(std::string("kernels: ") + what + ": " + cudaGetErrorString(error),
                      "see nvidia-smi and dmesg; rerun with CUDA_LAUNCH_BLOCKING=1 to find the first failing call", core::kExitIo);
}

cudaStream_t stream_of(const Exec& exec) { return static_cast<cudaStream_t>(exec.stream); }

int64_t multiprocessors() {
  int device_index = 0, n = 0;
  check(cudaGetDevice(&device_index), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device_index), "cudaDeviceGetAttribute");
  return n;
}

// Grids never depend on device data: enough blocks to fill the machine, at most one per unit of work.
int64_t grid(int64_t most, int64_t per_multiprocessor) {
  return std::max<int64_t>(1, std::min(most, multiprocessors() * per_multiprocessor));
}

template <class T, class Problem>
void run_tiles(const Problem& problem, int64_t most_tiles, const Exec& exec) {
  check(launch(tile_kernel<T, Problem>, grid(most_tiles, 4), kThreads, TileShape<T>::kShared, stream_of(exec), problem),
        "launch of a ragged product");
}

struct RouteStorage {
  int32_t *perm, *inverse, *offsets, *status, *counts;
};
RouteStorage cut_route(Arena& arena, int64_t pairs, int64_t experts) {
  RouteStorage s{};
  s.perm = arena.take<int32_t>(pairs);
  s.inverse = arena.take<int32_t>(pairs);
  s.offsets = arena.take<int32_t>(experts + 1);
  s.status = arena.take<int32_t>(1);
  s.counts = arena.take<int32_t>((experts + 1) * std::max<int64_t>(1, ceil_div(pairs, kRouteBlock)));
  return s;
}

int32_t read_flag(const int32_t* flag, const Exec& exec) {
  int32_t value = 0;
  check(cudaMemcpyAsync(&value, flag, sizeof value, cudaMemcpyDeviceToHost, stream_of(exec)), "reading a status");
  check(cudaStreamSynchronize(stream_of(exec)), "waiting for a status");
  return value;
}

template <class T>
struct Cuda {
  static size_t segments_bytes(int64_t experts) { return static_cast<size_t>(experts + 1) * (sizeof(int64_t) + 3 * sizeof(int32_t)); }

  static Segments make_segments(const Route& route, const int64_t* row_offsets, int64_t max_rank, void* storage, const Exec& exec) {
    const int64_t n = route.experts + 1;
    auto* pair_offsets = static_cast<int64_t*>(storage);
    auto* shrink_tiles = reinterpret_cast<int32_t*>(pair_offsets + n);
    check(launch(segment_tables, 1, 32, 0, stream_of(exec), route.offsets, row_offsets, static_cast<int>(route.experts), pair_offsets,
                 shrink_tiles, shrink_tiles + n, shrink_tiles + 2 * n),
          "launch of segment_tables");
    return {row_offsets, pair_offsets, shrink_tiles, shrink_tiles + n, shrink_tiles + 2 * n, max_rank};
  }

  static int64_t splits_of(int64_t pairs, int64_t width) { return pairs <= kSplitPairs ? std::max<int64_t>(1, ceil_div(width, kSplitChunk)) : 1; }

  // Either the planes of a shrink or two sets of pair rows (a and b in inference, or one in float).
  static size_t scratch_bytes(int64_t pairs, int64_t max_rank, int64_t max_width) {
    const int64_t planes = splits_of(pairs, max_width) * pair_buffer_bound(pairs, max_rank);
    return sizeof(float) * static_cast<size_t>(std::max(planes, 2 * pairs * max_width));
  }

  static void weights(const WeightsArgs& a, const Exec& exec) {
    const Ragged g = ragged(*a.route, {});
    check(launch(pair_weights, grid(ceil_div(g.pairs, 256), 8), 256, 0, stream_of(exec), g, static_cast<const float*>(a.gates), a.scale,
                 static_cast<float*>(a.weighted), static_cast<float*>(a.scaled)),
          "launch of pair_weights");
  }

  static int64_t pair_blocks(const Route& route) { return grid(ceil_div(route.pairs(), kRowThreads / 32), 16); }

  template <class Out>
  static void shrink_to(const ShrinkArgs& a, void* scratch, const Exec& exec) {
    const Ragged g = ragged(*a.route, a.segments);
    if (g.pairs == 0 || a.segments.max_rank == 0) return;
    const T* x = static_cast<const T*>(a.x.data);
    if (a.matrix == nullptr) {
      check(launch(gather_pairs<T, Out>, pair_blocks(*a.route), kRowThreads, 0, stream_of(exec), g, x, a.x.ld, a.x.divisor,
                   static_cast<Out*>(a.out)),
            "launch of gather_pairs");
      return;
    }
    const int64_t splits = splits_of(g.pairs, a.width), stride = pair_buffer_bound(g.pairs, a.segments.max_rank);
    auto* planes = static_cast<float*>(scratch);
    const ShrinkProblem<T> problem{g, a.segments.shrink_tiles, x, a.x.ld, a.x.divisor, static_cast<const T*>(a.matrix), a.width,
                                   splits, splits == 1 ? a.width : kSplitChunk, planes, stride};
    const int64_t most = (ceil_div(g.pairs, kBlock) + g.experts) * ceil_div(a.segments.max_rank, kBlock) * splits;
    run_tiles<T>(problem, most, exec);
    check(launch(sum_planes<Out>, pair_blocks(*a.route), kRowThreads, 0, stream_of(exec), g, static_cast<const float*>(planes), stride,
                 splits, static_cast<Out*>(a.out)),
          "launch of sum_planes");
  }
  static void shrink(const ShrinkArgs& a, void* scratch, const Exec& exec) { shrink_to<T>(a, scratch, exec); }
  static void shrink_unrounded(const ShrinkArgs& a, void* scratch, const Exec& exec) { shrink_to<float>(a, scratch, exec); }

  static int64_t expand_tile_bound(const Route& route, int64_t width) {
    return (ceil_div(route.pairs(), kBlock) + route.experts) * ceil_div(width, kBlock);
  }

  static void expand_rows(const Route& route, const ExpandTerm& term, int64_t width, float* rows, const int64_t* previous,
                          const Exec& exec) {
    const Ragged g = ragged(route, term.segments);
    if (g.pairs == 0 || term.segments.max_rank == 0) return;
    const T* pairs = static_cast<const T*>(term.pairs);
    if (term.matrix == nullptr) {
      check(launch(spread_pairs<T>, pair_blocks(route), kRowThreads, 0, stream_of(exec), g, pairs, width, rows, previous),
            "launch of spread_pairs");
      return;
    }
    const ExpandProblem<T> problem{g,    term.segments.expand_tiles, pairs,   static_cast<const T*>(term.matrix), width, rows, previous,
                                   nullptr, nullptr,                 0,       nullptr};
    run_tiles<T>(problem, expand_tile_bound(route, width), exec);
  }

  static void combine(const CombineArgs& a, void* scratch, const Exec& exec) {
    const Route& route = *a.route;
    if (route.tokens == 0) return;
    auto* rows = static_cast<float*>(scratch);
    for (int i = 0; i < a.num_terms; ++i)
      expand_rows(route, a.terms[i], a.width, rows, i == 0 ? nullptr : a.terms[0].segments.row_offsets, exec);
    check(launch(combine_rows<T>, grid(route.tokens, 16), kRowThreads, 0, stream_of(exec), ragged(route, a.terms[0].segments),
                 a.num_terms == 2 ? a.terms[1].segments.row_offsets : nullptr, static_cast<const float*>(rows),
                 static_cast<const float*>(a.weights), route.tokens, a.width, static_cast<const T*>(a.y0.data), a.y0.ld,
                 static_cast<T*>(a.y.data), a.y.ld),
          "launch of combine_rows");
  }

  static void outer(const OuterArgs& a, void*, const Exec& exec) {
    if (a.segments.max_rank == 0) return;
    const Ragged g = ragged(*a.route, a.segments);
    const OuterProblem<T> problem{g,         a.segments.outer_tiles, static_cast<const T*>(a.pairs), static_cast<const T*>(a.rows.data),
                                  a.rows.ld, a.rows.divisor,         a.width,                        static_cast<float*>(a.out),
                                  a.accumulate};
    run_tiles<T>(problem, g.experts * ceil_div(a.segments.max_rank, kBlock) * ceil_div(a.width, kBlock), exec);
  }

  static void scale_pairs(const ScalePairsArgs& a, const Exec& exec) {
    const Ragged g = ragged(*a.route, a.segments);
    if (g.pairs == 0) return;
    if (a.dot != nullptr && !a.accumulate_dot) cuda_zero(a.dot, static_cast<size_t>(g.pairs) * sizeof(float), exec);
    if (a.segments.max_rank == 0) return;
    check(launch(scale_pair_rows<T>, pair_blocks(*a.route), kRowThreads, 0, stream_of(exec), g, static_cast<const T*>(a.u),
                 static_cast<const float*>(a.v), static_cast<const float*>(a.weights), a.scale, static_cast<T*>(a.out_u),
                 static_cast<T*>(a.out_v), static_cast<float*>(a.dot)),
          "launch of scale_pair_rows");
  }

  static void ffn_hidden(const FfnHiddenArgs& a, void* scratch, const Exec& exec) {
    const Route& route = *a.route;
    if (route.tokens == 0) return;
    T* save_a = a.a != nullptr ? static_cast<T*>(a.a) : static_cast<T*>(scratch);
    T* save_b = a.b != nullptr ? static_cast<T*>(a.b) : static_cast<T*>(scratch) + route.pairs() * a.width;
    const auto activation = [&](const ExpandTerm& term, T* out, const ConstRows& base, const float* scale) {
      if (term.segments.max_rank == 0) return;
      const ExpandProblem<T> problem{ragged(route, term.segments), term.segments.expand_tiles, static_cast<const T*>(term.pairs),
                                     static_cast<const T*>(term.matrix), a.width, nullptr, nullptr, out,
                                     static_cast<const T*>(base.data), base.ld, scale};
      run_tiles<T>(problem, expand_tile_bound(route, a.width), exec);
    };
    activation(a.gate, save_a, a.gate_base, a.gate_scale);
    activation(a.up, save_b, a.up_base, a.up_scale);
    check(launch(hidden_forward<T>, grid(route.tokens, 16), kRowThreads, 0, stream_of(exec), ragged(route, a.gate.segments),
                 a.up.segments.row_offsets, static_cast<const float*>(a.gates), static_cast<const T*>(a.gate_base.data), a.gate_base.ld,
                 static_cast<const T*>(a.up_base.data), a.up_base.ld, route.tokens, a.width, save_a, save_b, static_cast<T*>(a.h),
                 static_cast<T*>(a.hidden_sum.data), a.hidden_sum.ld),
          "launch of hidden_forward");
  }

  static void ffn_hidden_backward(const FfnHiddenBackwardArgs& a, void* scratch, const Exec& exec) {
    const Route& route = *a.route;
    if (route.tokens == 0) return;
    auto* rows = static_cast<float*>(scratch);
    expand_rows(route, a.down, a.width, rows, nullptr, exec);
    check(launch(hidden_backward<T>, grid(route.tokens, 16), kRowThreads, 0, stream_of(exec), ragged(route, a.down.segments),
                 static_cast<const float*>(rows), static_cast<const float*>(a.gates), static_cast<const T*>(a.q.data), a.q.ld,
                 route.tokens, a.width, static_cast<const T*>(a.a), static_cast<const T*>(a.b), static_cast<T*>(a.h),
                 static_cast<T*>(a.da), static_cast<T*>(a.db), static_cast<T*>(a.dgate_base.data), a.dgate_base.ld,
                 static_cast<T*>(a.dup_base.data), a.dup_base.ld, static_cast<float*>(a.dot)),
          "launch of hidden_backward");
  }

  static void mask(const MaskArgs& a, const Exec& exec) {
    const int64_t count = a.tokens * a.row;
    if (count == 0) return;
    check(launch(mask_ranks<T>, grid(ceil_div(count, 256), 8), 256, 0, stream_of(exec), count, a.scale, static_cast<const float*>(a.u),
                 static_cast<const float*>(a.v), static_cast<const float*>(a.mask), static_cast<T*>(a.masked_u),
                 static_cast<T*>(a.masked_v), static_cast<float*>(a.dmask)),
          "launch of mask_ranks");
  }

  static const Backend& table() {
    static const Backend backend{sizeof(T), segments_bytes,   make_segments, scratch_bytes, weights,
                                 shrink,    shrink_unrounded, combine,       outer,         scale_pairs,
                                 ffn_hidden, ffn_hidden_backward, mask};
    return backend;
  }
};

}  // namespace

bool cuda_available() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

const Backend* cuda_backend(DType dtype) {
  switch (dtype) {
    case DType::kF32: return &Cuda<float>::table();
    case DType::kBF16: return &Cuda<__nv_bfloat16>::table();
    case DType::kF16: return &Cuda<__half>::table();
    default: return nullptr;
  }
}

size_t cuda_route_bytes(int64_t tokens, int64_t slots, int64_t experts) {
  Arena arena;
  cut_route(arena, tokens * slots, experts);
  return arena.used();
}

Route cuda_route_build(const int32_t* index, int64_t tokens, int64_t slots, int64_t experts, Workspace storage, const Exec& exec) {
  Arena arena(storage, "kernels/route");
  const int64_t pairs = tokens * slots, blocks = std::max<int64_t>(1, ceil_div(pairs, kRouteBlock));
  const RouteStorage s = cut_route(arena, pairs, experts);
  arena.check();
  const int64_t entries = (experts + 1) * blocks;
  cuda_zero(s.counts, static_cast<size_t>(entries) * sizeof(int32_t), exec);
  cuda_zero(s.status, sizeof(int32_t), exec);
  const int count = static_cast<int>(experts), width = static_cast<int>(blocks);
  check(launch(route_count, blocks, kRouteBlock, 0, stream_of(exec), index, pairs, count, width, s.counts, s.status), "launch of route_count");
  check(launch(route_scan, 1, kRouteBlock, 0, stream_of(exec), s.counts, entries, width, count, s.offsets), "launch of route_scan");
  check(launch(route_scatter, blocks, kRouteBlock, 0, stream_of(exec), index, pairs, count, width,
               static_cast<const int32_t*>(s.counts), s.perm, s.inverse, s.status),
        "launch of route_scatter");
  if (exec.check_inputs && read_flag(s.status, exec) != 0)
    throw core::UserError("kernels/route: an expert index is out of range: experts " + std::to_string(experts),
                          "an index is -1 (empty slot) or the number of an expert");
  return {tokens, slots, experts, s.perm, s.inverse, s.offsets, s.status};
}

void cuda_zero(void* data, size_t bytes, const Exec& exec) {
  check(cudaMemsetAsync(data, 0, bytes, stream_of(exec)), "cudaMemsetAsync");
}

void cuda_check_finite(const void* gates, int64_t n, const Exec& exec) {
  int32_t* found = nullptr;
  check(cudaMallocAsync(reinterpret_cast<void**>(&found), sizeof *found, stream_of(exec)), "cudaMallocAsync");
  cuda_zero(found, sizeof *found, exec);
  check(launch(find_not_finite, grid(ceil_div(n, 256), 8), 256, 0, stream_of(exec), static_cast<const float*>(gates), n, found),
        "launch of find_not_finite");
  const int32_t bad = read_flag(found, exec);
  check(cudaFreeAsync(found, stream_of(exec)), "cudaFreeAsync");
  if (bad != 0)
    throw core::NumericError("kernels: a gate is not finite", "check the router's logits: they or the tokens hold NaN or Inf");
}

}  // namespace moraine::kernels
