#pragma once

// Runs the CUDA kernels on the host: blocks one after another, the threads of a block as fibers that switch at barriers
// and warp collectives. Fragment layouts of ldmatrix and mma follow the PTX manual, cp.async lands at a random time
// between issue and wait, shared memory starts as NaN. wgmma decodes its descriptors as the manual defines them and
// runs at a random time between issue and wait; it reads a second copy of shared memory, where a write is NaN until the
// thread that made it has waited for it and fenced the async proxy. What this cannot show: speed, and races between
// warps that a switch never exposes.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

#include "kernels/cpu_storage.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define MORAINE_UNREACHABLE() std::abort()
#define MORAINE_SM90A 1
#define MORAINE_CUDA_WGMMA 1
#define MORAINE_DYNAMIC_SHARED(name) unsigned char* const name = ::moraine::kernels::device::host_shared()

struct HostIndex {
  unsigned x = 0;
};
extern HostIndex threadIdx, blockIdx, blockDim, gridDim;
void __syncthreads();

struct __nv_bfloat16 : moraine::kernels::BFloat16 {};
struct __half : moraine::kernels::Float16 {};
inline float __bfloat162float(__nv_bfloat16 x) {
  return moraine::kernels::widen(static_cast<moraine::kernels::BFloat16>(x));
}
inline float __half2float(__half x) { return moraine::kernels::widen(static_cast<moraine::kernels::Float16>(x)); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  __nv_bfloat16 out;
  moraine::kernels::narrow(x, static_cast<moraine::kernels::BFloat16*>(&out));
  return out;
}
inline __half __float2half_rn(float x) {
  __half out;
  moraine::kernels::narrow(x, static_cast<moraine::kernels::Float16*>(&out));
  return out;
}

// The part of the runtime API the kernels and the test harness call.
enum cudaError_t { cudaSuccess = 0, cudaErrorMemoryAllocation = 2 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
using cudaStream_t = void*;
cudaError_t cudaMalloc(void** out, size_t bytes);
cudaError_t cudaFree(void* p);
inline cudaError_t cudaMallocAsync(void** out, size_t bytes, cudaStream_t) { return cudaMalloc(out, bytes); }
inline cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return cudaFree(p); }
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* out) { return *out = 0, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* out) { return *out = 1, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* out, cudaDeviceAttr, int device);
inline const char* cudaGetErrorString(cudaError_t) { return "host emulation"; }

namespace moraine::kernels::device {

/// Multiprocessors the host pretends to have: how many blocks a persistent grid gets.
extern int host_multiprocessors;
/// Its compute capability times 10.
extern int host_capability;

unsigned char* host_shared();
void copy_async(void* to, const void* from, int bytes);
void commit_copies();
void wait_copies_until(int groups_left);
template <int N>
void wait_copies() {
  wait_copies_until(N);
}
void load_matrices(uint32_t (&r)[4], const void* row);
void load_matrices_transposed(uint32_t (&r)[4], const void* row);
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16);
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half);
float warp_sum(float x);

uint32_t shared_address(const void* p);
void barrier_init(uint64_t* barrier, int arrivals);
void barrier_arrive(uint64_t* barrier);
void barrier_wait(uint64_t* barrier, uint32_t parity);
void fence_async_proxy();
template <int>
void raise_registers() {}
template <int>
void lower_registers() {}
void wgmma_fence();
void wgmma_commit();
void wgmma_wait_until(int groups_left);
template <int N>
void wgmma_wait() {
  wgmma_wait_until(N);
}
template <int N>
void pin(float (&)[N]) {}
/// c holds `columns` / 2 accumulators; b is 16 x columns.
void wgmma_issue(float* c, int columns, uint64_t a, uint64_t b, bool left_by_depth, bool right_by_depth, bool bf16);
template <bool kLeftByDepth, bool kRightByDepth, int N>
void wgmma(float (&c)[N], uint64_t a, uint64_t b, __nv_bfloat16) {
  wgmma_issue(c, 2 * N, a, b, kLeftByDepth, kRightByDepth, true);
}
template <bool kLeftByDepth, bool kRightByDepth, int N>
void wgmma(float (&c)[N], uint64_t a, uint64_t b, __half) {
  wgmma_issue(c, 2 * N, a, b, kLeftByDepth, kRightByDepth, false);
}

void run_grid(int64_t blocks, int threads, size_t shared, const std::function<void()>& thread_body);
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), int64_t blocks, int threads, size_t shared, cudaStream_t, Args... args) {
  run_grid(blocks, threads, shared, [&] { kernel(args...); });
  return cudaSuccess;
}

}  // namespace moraine::kernels::device
