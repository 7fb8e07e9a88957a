#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

/// Instructions of compute capability 9.0 (wgmma and setmaxnreg: the sm_90a target) behind plain functions; part of
/// cuda_device.cuh, whose stand-in emulates them on the host. Bodies that use them belong under MORAINE_SM90A.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MORAINE_SM90A 1
#endif

namespace moraine::kernels::device {

// ---- mbarrier: `arrivals` arrivals complete a phase; phases are told apart by their parity, the first one is 0
// -----------

__device__ inline void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ inline void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier)) : "memory");
}
/// Waits until the phase of that parity is complete; returns at once if the current one has the other parity.
__device__ inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t complete = 0;
  while (complete == 0)
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(complete)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
}

/// Makes this thread's finished shared-memory writes visible to wgmma.
__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

/// Changes the registers of every thread of the calling warpgroup; the block's total must not grow.
template <int N>
__device__ inline void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(N));
}
template <int N>
__device__ inline void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(N));
}

// ---- wgmma
// -------------------------------------------------------------------------------------------------------------

/// Before the first wgmma and after any other access to its accumulators.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
/// Waits until at most N committed groups are under way.
template <int N>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(N) : "memory");
}
/// Keeps the compiler from moving accesses to the accumulators across this point.
template <int N>
__device__ inline void pin(float (&c)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(c[i])::"memory");
}

#define MORAINE_FLOATS_4(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define MORAINE_FLOATS_16(c, i) \
  MORAINE_FLOATS_4(c, i), MORAINE_FLOATS_4(c, i + 4), MORAINE_FLOATS_4(c, i + 8), MORAINE_FLOATS_4(c, i + 12)
#define MORAINE_REGISTERS_64                                                         \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MORAINE_REGISTERS_128                                                                    \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "             \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

/// c += a b by one warpgroup: a 64x16, b 16xN, both in shared memory behind descriptors (wgmma_descriptor in
/// cuda_wgmma.cuh); kLeftByDepth, kRightByDepth: stored [k][m], [k][n]. c: row 16 (warp % 4) + lane / 4 + 8 (i / 2 %
/// 2), column 8 (i / 4) + 2 (lane % 4) + i % 2 of the product. Asynchronous: c and the operands belong to the
/// instruction until wgmma_wait.
#define MORAINE_WGMMA(type, ptx)                                                                               \
  template <bool kLeftByDepth, bool kRightByDepth>                                                             \
  __device__ inline void wgmma(float(&c)[64], uint64_t a, uint64_t b, type) {                                  \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." ptx "." ptx " {" MORAINE_REGISTERS_64          \
                 "}, %64, %65, 1, 1, 1, %66, %67;\n"                                                           \
                 : MORAINE_FLOATS_16(c, 0), MORAINE_FLOATS_16(c, 16), MORAINE_FLOATS_16(c, 32),                \
                   MORAINE_FLOATS_16(c, 48)                                                                    \
                 : "l"(a), "l"(b), "n"(static_cast<int>(kLeftByDepth)), "n"(static_cast<int>(kRightByDepth))); \
  }                                                                                                            \
  template <bool kLeftByDepth, bool kRightByDepth>                                                             \
  __device__ inline void wgmma(float(&c)[128], uint64_t a, uint64_t b, type) {                                 \
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." ptx "." ptx " {" MORAINE_REGISTERS_128         \
                 "}, %128, %129, 1, 1, 1, %130, %131;\n"                                                       \
                 : MORAINE_FLOATS_16(c, 0), MORAINE_FLOATS_16(c, 16), MORAINE_FLOATS_16(c, 32),                \
                   MORAINE_FLOATS_16(c, 48), MORAINE_FLOATS_16(c, 64), MORAINE_FLOATS_16(c, 80),               \
                   MORAINE_FLOATS_16(c, 96), MORAINE_FLOATS_16(c, 112)                                         \
                 : "l"(a), "l"(b), "n"(static_cast<int>(kLeftByDepth)), "n"(static_cast<int>(kRightByDepth))); \
  }
MORAINE_WGMMA(__nv_bfloat16, "bf16")
MORAINE_WGMMA(__half, "f16")
#undef MORAINE_WGMMA
#undef MORAINE_REGISTERS_128
#undef MORAINE_REGISTERS_64
#undef MORAINE_FLOATS_16
#undef MORAINE_FLOATS_4

}  // namespace moraine::kernels::device
