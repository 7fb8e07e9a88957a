#include "tests/kernels/cuda_on_host.h"

#include <array>
#include <cstdio>
#include <cstdlib>
#include <deque>
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
// A wgmma of one warpgroup: its threads issue it one by one, the product is formed once, when all have.
struct Wgmma {
  int columns = 0, issued = 0, taken = 0;
  uint64_t a = 0, b = 0;
  bool left_by_depth = false, right_by_depth = false, bf16 = false;
  bool done = false;
  std::vector<float> product;  // [64][columns]
};
struct IssuedWgmma {
  float* c;
  int64_t number;  // within the warpgroup
  int group;
};
struct Warpgroup {
  std::deque<Wgmma> queue;
  int64_t first = 0;  // number of the queue's front
};

struct Fiber {
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStack]};
  void* context = nullptr;
  bool done = false;
  int committed = 0;
  std::vector<PendingCopy> pending;
  std::vector<PendingCopy> issued;  // copies this thread has not waited for, landed or not
  std::vector<size_t> unfenced;     // 16-byte pieces of shared memory it has waited for, but not fenced
  std::vector<IssuedWgmma> wgmmas;
  int64_t wgmma_count = 0;
  int wgmma_groups = 0;
  bool wgmma_fenced = false;
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
  std::vector<unsigned char> async_shared;  // shared memory as the async proxy sees it
  std::vector<Warpgroup> warpgroups;
  bool async_proxy = false;  // the block's kernel uses it
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

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

// What shared memory begins at: the pattern of the 128-byte swizzle repeats every 1024 bytes, and no address is 0.
constexpr size_t kSharedAlign = 1024;
unsigned char* shared_begin() {
  const auto begin = reinterpret_cast<uintptr_t>(machine.shared.data());
  return machine.shared.data() + (kSharedAlign - begin % kSharedAlign) % kSharedAlign;
}

Warp& warp() { return machine.warps[threadIdx.x / 32]; }
void sync_warp() { wait_at(warp().barrier, 32); }

void land(const PendingCopy& copy) {
  std::memset(copy.to, 0, 16);
  std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
  if (!machine.async_proxy) return;
  const auto at = static_cast<size_t>(static_cast<unsigned char*>(copy.to) - shared_begin());
  std::memset(&machine.async_shared[at], 0xff, 16);
}

void fiber_main() {
  (*machine.body)();
  Fiber& self = machine.fibers[static_cast<size_t>(machine.current)];
  if (!self.pending.empty()) {
    fail("a thread ended with asynchronous copies under way");
  }
  if (!self.wgmmas.empty()) fail("a thread ended without waiting for its wgmmas");
  self.done = true;
  ++machine.progress;
  yield();
}

void start_fiber(Fiber& fiber) {
  fiber.done = false;
  fiber.committed = 0;
  fiber.issued.clear();
  fiber.unfenced.clear();
  fiber.wgmma_count = 0, fiber.wgmma_groups = 0, fiber.wgmma_fenced = false;
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
  machine.async_proxy = false;
  for (Warpgroup& w : machine.warpgroups) w = {};
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
  // A element (row, k): lane 4 (row % 8) + (k % 8) / 2, register (row / 8) + 2 (k / 8); B element (k, n): lane 4 n + (k
  // % 8) / 2, register k / 8; C element i of a lane: row lane / 4 + 8 (i / 2), column 2 (lane % 4) + i % 2.
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
      const unsigned r_in = transposed ? 2 * (lane % 4) + i : lane / 4,
                     c_in = transposed ? lane / 4 : 2 * (lane % 4) + i;
      std::memcpy(&pair[i], static_cast<const unsigned char*>(w.rows[8 * m + r_in]) + 2 * c_in, 2);
    }
    r[m] = static_cast<uint32_t>(pair[0]) | static_cast<uint32_t>(pair[1]) << 16;
  }
  sync_warp();
}

}  // namespace

int host_multiprocessors = 3;
int host_capability = 90;
unsigned char* host_shared() { return shared_begin(); }
uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - shared_begin() + kSharedAlign);
}

void copy_async(void* to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    std::fprintf(stderr, "cp.async is not aligned to 16 bytes\n");
    std::abort();
  }
  const PendingCopy copy{to, from, bytes, machine.fibers[threadIdx.x].committed};
  if (machine.async_proxy) machine.fibers[threadIdx.x].issued.push_back(copy);
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
  std::vector<PendingCopy> still;
  for (const PendingCopy& copy : self.issued) {
    if (copy.group < self.committed - groups_left) {
      self.unfenced.push_back(static_cast<size_t>(static_cast<unsigned char*>(copy.to) - shared_begin()));
    } else {
      still.push_back(copy);
    }
  }
  self.issued.swap(still);
}

// ---- mbarrier: [63..48] a mark, [47] the current phase's parity, [46..24] arrivals pending, [23..0] arrivals per
// phase --------

namespace {
constexpr uint64_t kMark = 0xb7a1;
uint64_t& checked(uint64_t* barrier) {
  if (*barrier >> 48 != kMark) fail("an mbarrier is used before it is initialised, or was overwritten");
  return *barrier;
}
}  // namespace

void barrier_init(uint64_t* barrier, int arrivals) {
  const auto count = static_cast<uint64_t>(arrivals);
  *barrier = kMark << 48 | count << 24 | count;
  if (!machine.async_proxy) {
    machine.async_proxy = true;
    std::fill(machine.async_shared.begin(), machine.async_shared.end(), static_cast<unsigned char>(0xff));
  }
}

void barrier_arrive(uint64_t* barrier) {
  uint64_t& state = checked(barrier);
  ++machine.progress;
  const uint64_t pending = state >> 24 & 0x7fffff, count = state & 0xffffff;
  state -= uint64_t{1} << 24;
  if (pending == 1) state = (state ^ uint64_t{1} << 47) + (count << 24);
}

void barrier_wait(uint64_t* barrier, uint32_t parity) {
  while ((checked(barrier) >> 47 & 1) == parity) yield();
  ++machine.progress;
}

void fence_async_proxy() {
  Fiber& self = machine.fibers[threadIdx.x];
  for (const size_t at : self.unfenced) std::memcpy(&machine.async_shared[at], shared_begin() + at, 16);
  self.unfenced.clear();
}

// ---- wgmma
// ---------------------------------------------------------------------------------------------------------------------

namespace {

// Eight elements that lie side by side in memory, of an operand behind a descriptor. K-major: (8,m),(8,2k) : (128 B,
// SBO), (2 B, 16 B). Stored by depth: (64,m),(8,k) : (2 B, LBO),(128 B, SBO). Then bits 4..6 of the address are xored
// with bits 7..9.
template <class Take>
void decode(uint64_t descriptor, int extent, bool by_depth, Take take) {
  const auto field = [&](int bit) { return (descriptor >> bit & 0x3fff) << 4; };
  const uint64_t start = field(0), leading = field(16), stride = field(32);
  if (descriptor >> 62 != 1) fail("wgmma: only the 128-byte swizzle is emulated");
  if ((descriptor >> 49 & 7) != 0) fail("wgmma: base offsets are not emulated");
  const auto at = [&](uint64_t offset) {
    const uint64_t linear = start + offset, address = linear ^ (linear >> 7 & 7) << 4;
    if (address < kSharedAlign || address + 16 > kSharedAlign + machine.async_shared.size())
      fail("wgmma: a descriptor points outside shared memory");
    uint16_t bits[8];
    std::memcpy(bits, &machine.async_shared[address - kSharedAlign], 16);
    return std::to_array(bits);
  };
  if (by_depth) {
    for (uint64_t k = 0; k < 16; ++k)
      for (uint64_t m = 0; m < static_cast<uint64_t>(extent); m += 8) {
        const auto bits = at(m / 64 * leading + m % 64 * 2 + k / 8 * stride + k % 8 * 128);
        for (size_t i = 0; i < 8; ++i) take(m + i, k, bits[i]);
      }
  } else {
    for (uint64_t m = 0; m < static_cast<uint64_t>(extent); ++m)
      for (uint64_t k = 0; k < 16; k += 8) {
        const auto bits = at(m / 8 * stride + m % 8 * 128 + k * 2);
        for (size_t i = 0; i < 8; ++i) take(m, k + i, bits[i]);
      }
  }
}

void run(Wgmma& op) {
  static float left[64][16], right[16][256];
  bool finite = true, nonzero[64] = {};
  const auto widened = [&](uint16_t bits) { return op.bf16 ? widen(BFloat16{bits}) : widen(Float16{bits}); };
  decode(op.a, 64, op.left_by_depth, [&](uint64_t m, uint64_t k, uint16_t bits) {
    left[m][k] = widened(bits);
    nonzero[m] |= (bits & 0x7fff) != 0;
  });
  decode(op.b, op.columns, op.right_by_depth, [&](uint64_t n, uint64_t k, uint16_t bits) {
    right[k][n] = widened(bits);
    finite &= std::isfinite(right[k][n]);
  });
  const auto columns = static_cast<size_t>(op.columns);
  op.product.assign(64 * columns, 0.0f);
  for (size_t m = 0; m < 64; ++m) {
    if (finite && !nonzero[m]) continue;  // mostly rows past the end of a small expert
    float* const row = &op.product[m * columns];
    for (size_t k = 0; k < 16; ++k)
      for (size_t n = 0; n < columns; ++n) row[n] += left[m][k] * right[k][n];
  }
  op.done = true;
}

Warpgroup& warpgroup() { return machine.warpgroups[threadIdx.x / 128]; }

}  // namespace

void wgmma_fence() { machine.fibers[threadIdx.x].wgmma_fenced = true; }
void wgmma_commit() { ++machine.fibers[threadIdx.x].wgmma_groups; }

void wgmma_issue(float* c, int columns, uint64_t a, uint64_t b, bool left_by_depth, bool right_by_depth, bool bf16) {
  Fiber& self = machine.fibers[threadIdx.x];
  Warpgroup& w = warpgroup();
  if (!self.wgmma_fenced) fail("wgmma without a wgmma.fence since its accumulators were last free");
  const auto index = static_cast<size_t>(self.wgmma_count - w.first);
  if (index == w.queue.size()) {
    w.queue.emplace_back();
    Wgmma& op = w.queue.back();
    op.columns = columns, op.a = a, op.b = b;
    op.left_by_depth = left_by_depth, op.right_by_depth = right_by_depth, op.bf16 = bf16;
  }
  Wgmma& op = w.queue[index];
  if (op.a != a || op.b != b) fail("wgmma: the threads of a warpgroup disagree on a descriptor");
  self.wgmmas.push_back({c, self.wgmma_count++, self.wgmma_groups});
  ++machine.progress;
  if (++op.issued == 128 && machine.random() % 2 == 0) run(op);
}

void wgmma_wait_until(int groups_left) {
  Fiber& self = machine.fibers[threadIdx.x];
  Warpgroup& w = warpgroup();
  const unsigned lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
  size_t taken = 0;
  for (; taken < self.wgmmas.size() && self.wgmmas[taken].group < self.wgmma_groups - groups_left; ++taken) {
    const IssuedWgmma& mine = self.wgmmas[taken];
    const auto op = [&]() -> Wgmma& { return w.queue[static_cast<size_t>(mine.number - w.first)]; };
    while (op().issued < 128) yield();
    if (!op().done) run(op());
    const auto columns = static_cast<size_t>(op().columns);
    for (size_t i = 0; i < columns / 2; ++i)
      mine.c[i] += op().product[(row + 8 * (i / 2 % 2)) * columns + i / 4 * 8 + 2 * (lane % 4) + i % 2];
    ++machine.progress;
    ++op().taken;
    while (!w.queue.empty() && w.queue.front().taken == 128) w.queue.pop_front(), ++w.first;
  }
  self.wgmmas.erase(self.wgmmas.begin(), self.wgmmas.begin() + static_cast<int64_t>(taken));
  if (self.wgmmas.empty()) self.wgmma_fenced = false;
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
  machine.warpgroups.resize(static_cast<size_t>((threads + 127) / 128));
  machine.shared.resize(shared + kSharedAlign);
  machine.async_shared.resize(shared + kSharedAlign);
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

void __syncthreads() {
  moraine::kernels::device::wait_at(moraine::kernels::device::machine.block, moraine::kernels::device::machine.threads);
}

cudaError_t cudaMalloc(void** out, size_t bytes) {
  *out = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return *out == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  std::free(p);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* out, cudaDeviceAttr attribute, int) {
  using namespace moraine::kernels::device;
  if (attribute == cudaDevAttrMultiProcessorCount) *out = host_multiprocessors;
  if (attribute == cudaDevAttrComputeCapabilityMajor) *out = host_capability / 10;
  if (attribute == cudaDevAttrComputeCapabilityMinor) *out = host_capability % 10;
  return cudaSuccess;
}
