#pragma once

#include "kernels/cuda_device.cuh"
#include "kernels/layout.h"

/// Routing on the device: a stable counting sort without atomics, and the offsets and tile tables that follow from it.
/// Outputs are overwritten.
namespace moraine::kernels::device {

constexpr int kRouteBlock = 256;

// Bucket of a pair: its expert, E for empty slots and for indices out of range, which also raise the status.
__device__ inline int bucket_of(const int32_t* index, int64_t p, int64_t pairs, int experts, int32_t* status) {
  if (p >= pairs) return -1;
  const int32_t e = index[p];
  if (e < -1 || e >= experts) *status = 1;  // every writer writes the same value
  return e < 0 || e >= experts ? experts : e;
}

// counts[bucket * blocks + block] = pairs of the bucket in this block of kRouteBlock pairs.
__global__ void route_count(const int32_t* index, int64_t pairs, int experts, int blocks, int32_t* counts,
                            int32_t* status) {
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

__global__ void route_scatter(const int32_t* index, int64_t pairs, int experts, int blocks, const int32_t* counts,
                              int32_t* perm, int32_t* inverse, int32_t* status) {
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
__global__ void segment_tables(const int32_t* offsets, const int64_t* row_offsets, int experts, LargeTiles rule,
                               int64_t* pair_offsets, TileTables small, TileTables large) {
  if (threadIdx.x == 0) fill_tables(offsets, row_offsets, experts, rule, pair_offsets, small, large);
}

}  // namespace moraine::kernels::device
