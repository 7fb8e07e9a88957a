#include "tests/kernels/cuda_on_host.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

// The kernels themselves, as host code.
#include "kernels/cuda_backend.cu"

// Saves the callee-saved registers on the current stack and continues on another one.
extern "C" void moraine_switch_stack(void** save, void* load);
asm(R"(
.text
.globl moraine_switch_stack
.type moraine_switch_stack,@function
moraine_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size moraine_switch_stack,.-moraine_switch_stack
)");

HostIndex threadIdx, blockIdx, blockDim, gridDim;

namespace moraine::kernels::device {
namespace {

constexpr size_t kStack = 64 << 10;

struct PendingCopy {
  void* to;
  const void* from;
  int bytes, group;
};
struct Fiber {
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStack]};
  void* context = nullptr;
  bool done = false;
  int committed = 0;
  std::vector<PendingCopy> pending;
};
struct Barrier {
  int arrived = 0;
  int64_t generation = 0;
};
struct Warp {
  Barrier barrier;
  const void* rows[32];
  uint32_t a[32][4], b[32][2];
  float x[32];
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier block;
  std::vector<unsigned char> shared;
  void* scheduler = nullptr;
  int current = 0, threads = 0;
  int64_t progress = 0;
  const std::function<void()>* body = nullptr;
  std::mt19937 random{12345};
};
Machine machine;

void yield() {
  const int self = machine.current;
  moraine_switch_stack(&machine.fibers[static_cast<size_t>(self)].context, machine.scheduler);
}

void wait_at(Barrier& barrier, int participants) {
  ++machine.progress;
  const int64_t generation = barrier.generation;
  if (++barrier.arrived == participants) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) yield();
}

Warp& warp() { return machine.warps[threadIdx.x / 32]; }
void sync_warp() { wait_at(warp().barrier, 32); }

void land(const PendingCopy& copy) {
  std::memset(copy.to, 0, 16);
  std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
}

void fiber_main() {
  (*machine.body)();
  Fiber& self = machine.fibers[static_cast<size_t>(machine.current)];
  if (!self.pending.empty()) {
    std::fprintf(stderr, "a thread ended with asynchronous copies under way\n");
    std::abort();
  }
  self.done = true;
  ++machine.progress;
  yield();
}

void start_fiber(Fiber& fiber) {
  fiber.done = false;
  fiber.committed = 0;
  auto top = reinterpret_cast<uintptr_t>(fiber.stack.get() + kStack) & ~uintptr_t{15};
  auto* stack = reinterpret_cast<void**>(top) - 1;  // at entry the stack is 8 past a multiple of 16
  *--stack = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--stack = nullptr;
  fiber.context = stack;
}

void run_block() {
  const int threads = machine.threads;
  for (int t = 0; t < threads; ++t) start_fiber(machine.fibers[static_cast<size_t>(t)]);
  for (Warp& w : machine.warps) w.barrier = {};
  machine.block = {};
  std::fill(machine.shared.begin(), machine.shared.end(), static_cast<unsigned char>(0xff));
  for (int live = threads; live > 0;) {
    const int64_t before = machine.progress;
    const int first = static_cast<int>(machine.random() % static_cast<unsigned>(threads));
    for (int i = 0; i < threads; ++i) {
      machine.current = (first + i) % threads;
      Fiber& fiber = machine.fibers[static_cast<size_t>(machine.current)];
      if (fiber.done) continue;
      threadIdx.x = static_cast<unsigned>(machine.current);
      moraine_switch_stack(&machine.scheduler, fiber.context);
      live -= fiber.done;
    }
    if (machine.progress == before && live > 0) {
      std::fprintf(stderr, "deadlock: not all threads reached a barrier\n");
      std::abort();
    }
  }
}

template <class Convert>
void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Convert convert) {
  Warp& w = warp();
  const unsigned lane = threadIdx.x % 32;
  std::memcpy(w.a[lane], a, sizeof a);
  std::memcpy(w.b[lane], b, sizeof b);
  sync_warp();
  // A element (row, k): lane 4 (row % 8) + (k % 8) / 2, register (row / 8) + 2 (k / 8); B element (k, n): lane 4 n + (k % 8) / 2,
  // register k / 8; C element i of a lane: row lane / 4 + 8 (i / 2), column 2 (lane % 4) + i % 2.
  const auto half = [](uint32_t pair, unsigned index) { return static_cast<uint16_t>(pair >> (16 * index)); };
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + 8 * (i / 2), n = 2 * (lane % 4) + i % 2;
    float sum = c[i];
    for (unsigned k = 0; k < 16; ++k) {
      const uint16_t av = half(w.a[4 * (row % 8) + k % 8 / 2][row / 8 + 2 * (k / 8)], k % 2);
      const uint16_t bv = half(w.b[4 * n + k % 8 / 2][k / 8], k % 2);
      sum = std::fma(convert(av), convert(bv), sum);
    }
    c[i] = sum;
  }
  sync_warp();
}

void matrices(uint32_t (&r)[4], const void* row, bool transposed) {
  Warp& w = warp();
  const unsigned lane = threadIdx.x % 32;
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    std::fprintf(stderr, "ldmatrix row is not aligned to 16 bytes\n");
    std::abort();
  }
  w.rows[lane] = row;
  sync_warp();
  for (unsigned m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned r_in = transposed ? 2 * (lane % 4) + i : lane / 4, c_in = transposed ? lane / 4 : 2 * (lane % 4) + i;
      std::memcpy(&pair[i], static_cast<const unsigned char*>(w.rows[8 * m + r_in]) + 2 * c_in, 2);
    }
    r[m] = static_cast<uint32_t>(pair[0]) | static_cast<uint32_t>(pair[1]) << 16;
  }
  sync_warp();
}

}  // namespace

int host_multiprocessors = 3;
unsigned char* host_shared() { return machine.shared.data() + (128 - reinterpret_cast<uintptr_t>(machine.shared.data()) % 128) % 128; }

void copy_async(void* to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    std::fprintf(stderr, "cp.async is not aligned to 16 bytes\n");
    std::abort();
  }
  const PendingCopy copy{to, from, bytes, machine.fibers[threadIdx.x].committed};
  if (machine.random() % 2 == 0) {
    land(copy);
  } else {
    machine.fibers[threadIdx.x].pending.push_back(copy);
  }
}
void commit_copies() { ++machine.fibers[threadIdx.x].committed; }
void wait_copies_until(int groups_left) {
  Fiber& self = machine.fibers[threadIdx.x];
  std::vector<PendingCopy> later;
  for (const PendingCopy& copy : self.pending) {
    if (copy.group < self.committed - groups_left) {
      land(copy);
    } else {
      later.push_back(copy);
    }
  }
  self.pending.swap(later);
}

void load_matrices(uint32_t (&r)[4], const void* row) { matrices(r, row, false); }
void load_matrices_transposed(uint32_t (&r)[4], const void* row) { matrices(r, row, true); }
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
  multiply(c, a, b, [](uint16_t bits) { return widen(BFloat16{bits}); });
}
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  multiply(c, a, b, [](uint16_t bits) { return widen(Float16{bits}); });
}

float warp_sum(float x) {
  Warp& w = warp();
  const unsigned lane = threadIdx.x % 32;
  for (unsigned offset = 16; offset > 0; offset /= 2) {
    w.x[lane] = x;
    sync_warp();
    x += w.x[lane ^ offset];
    sync_warp();
  }
  return x;
}

void run_grid(int64_t blocks, int threads, size_t shared, const std::function<void()>& thread_body) {
  if (static_cast<int>(machine.fibers.size()) < threads) machine.fibers.resize(static_cast<size_t>(threads));
  machine.warps.resize(static_cast<size_t>((threads + 31) / 32));
  machine.shared.resize(shared + 128);
  machine.threads = threads;
  machine.body = &thread_body;
  gridDim.x = static_cast<unsigned>(blocks);
  blockDim.x = static_cast<unsigned>(threads);
  for (int64_t b = 0; b < blocks; ++b) {
    blockIdx.x = static_cast<unsigned>(b);
    run_block();
  }
}

}  // namespace moraine::kernels::device

void __syncthreads() { moraine::kernels::device::wait_at(moraine::kernels::device::machine.block, moraine::kernels::device::machine.threads); }

cudaError_t cudaMalloc(void** out, size_t bytes) {
  *out = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return *out == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  std::free(p);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* out, cudaDeviceAttr, int) {
  *out = moraine::kernels::device::host_multiprocessors;
  return cudaSuccess;
}
