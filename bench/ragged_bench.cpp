#include "bench/ragged_bench.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <ctime>

#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <immintrin.h>
#include <omp.h>

namespace bench {
namespace {

bool cpu_time = true;

__attribute__((target("avx2,fma"))) double fma_gflops() {
  __m256 c[12];
  for (int i = 0; i < 12; ++i) c[i] = _mm256_set1_ps(1.0f);
  const __m256 a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(0.5f);  // 1 is a fixed point: no denormals, no overflow
  const int64_t rounds = 10'000'000;
  const double start = now_s();
  for (int64_t r = 0; r < rounds; ++r) {  // twelve independent chains hide the latency; asm keeps them in registers
#define CHAIN(i) asm volatile("vfmadd132ps %1, %2, %0" : "+x"(c[i]) : "x"(a), "x"(b))
    CHAIN(0);
    CHAIN(1);
    CHAIN(2);
    CHAIN(3);
    CHAIN(4);
    CHAIN(5);
    CHAIN(6);
    CHAIN(7);
    CHAIN(8);
    CHAIN(9);
    CHAIN(10);
    CHAIN(11);
#undef CHAIN
  }
  return static_cast<double>(rounds) * 12 * 16 / (now_s() - start) / 1e9;
}

__attribute__((target("avx2"))) double read_gbps() {
  static std::vector<float> data(size_t{64} << 20, 1.0f);  // 256 MB, beyond every cache here
  double best = 0;
  for (int repeat = 0; repeat < 3; ++repeat) {
    const auto start = now_s();
    __m256 s[4] = {};
    for (size_t i = 0; i < data.size(); i += 32)
      for (size_t j = 0; j < 4; ++j) s[j] = _mm256_add_ps(s[j], _mm256_loadu_ps(&data[i + 8 * j]));
    volatile float sink = _mm256_cvtss_f32(_mm256_add_ps(_mm256_add_ps(s[0], s[1]), _mm256_add_ps(s[2], s[3])));
    (void)sink;
    best = std::max(best, static_cast<double>(data.size()) * 4 / seconds_since(start) / 1e9);
  }
  return best;
}

double copy_gbps() {  // bytes read plus bytes written
  static std::vector<float> from(size_t{32} << 20, 1.0f), to(from.size());
  double best = 0;
  for (int repeat = 0; repeat < 3; ++repeat) {
    const auto start = now_s();
    std::copy(from.begin(), from.end(), to.begin());
    best = std::max(best, static_cast<double>(from.size()) * 8 / seconds_since(start) / 1e9);
  }
  return best;
}

constexpr const char* kBaselines[] = {"B1", "B2", "B3", "B4", "B5", "B6", "B7"};

}  // namespace

void use_cpu_time(bool on) { cpu_time = on; }
bool uses_cpu_time() { return cpu_time; }
double now_s() {
  timespec t{};
  clock_gettime(cpu_time ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

Peaks measure_peaks(const char* when, int threads) {
  Peaks one{fma_gflops(), read_gbps()};
  std::printf("Peaks %s: 1 thread %.0f GFLOP/s FMA (fp32, AVX2), %.1f GB/s read, %.1f GB/s copy", when, one.gflops,
              one.gbps, copy_gbps());
  if (threads > 1) {
    double sum = 0;
#pragma omp parallel num_threads(threads) reduction(+ : sum)
    sum += fma_gflops();
    std::printf("; %d threads %.0f GFLOP/s", threads, sum);
    one.gflops = sum;
  }
  std::printf("\n");
  return one;
}

const std::vector<RankSet>& rank_sets() {
  static const std::vector<RankSet> sets{{"uniform16", {16}},
                                         {"small8", {1, 2, 4, 8, 8, 16, 16, 32}},
                                         {"mix8", {1, 4, 16, 32, 64, 256, 1024, 2048}},
                                         {"ladder", {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048}},
                                         {"flexmore_v02", {0, 64, 64, 32, 32, 16, 16}},
                                         {"flexmore_best", {0, 1024, 1024, 256, 64, 8, 4}}};
  return sets;
}
std::vector<int64_t> repeat_to(const std::vector<int64_t>& ranks, int64_t experts) {
  std::vector<int64_t> out;
  for (int64_t e = 0; e < experts; ++e) out.push_back(ranks[static_cast<size_t>(e) % ranks.size()]);
  return out;
}

std::vector<int32_t> draw_route(const std::string& kind, int64_t tokens, int64_t slots, int64_t experts,
                                std::mt19937& engine) {
  std::vector<double> mass(static_cast<size_t>(experts), 1.0);
  for (size_t e = 0; e < mass.size() && kind == "zipf"; ++e) mass[e] = 1 / std::pow(static_cast<double>(e + 1), 1.2);
  std::discrete_distribution<int32_t> draw(mass.begin(), mass.end());
  std::vector<int32_t> index;
  for (int64_t t = 0; t < tokens; ++t) {  // distinct experts within a token, as a router picks them
    std::vector<int32_t> chosen;
    while (static_cast<int64_t>(chosen.size()) < slots) {
      const int32_t e = kind == "one"
                            ? static_cast<int32_t>((experts - 1 + static_cast<int64_t>(chosen.size())) % experts)
                            : draw(engine);
      if (std::find(chosen.begin(), chosen.end(), e) == chosen.end()) chosen.push_back(e);
    }
    index.insert(index.end(), chosen.begin(), chosen.end());
  }
  return index;
}

std::vector<Segment> segments_of(const std::vector<int32_t>& index, int64_t slots, const std::vector<int64_t>& ranks,
                                 bool rank_zero_too) {
  std::vector<std::vector<int64_t>> pairs(ranks.size());
  for (size_t p = 0; p < index.size(); ++p) pairs[static_cast<size_t>(index[p])].push_back(static_cast<int64_t>(p));
  std::vector<Segment> out;
  for (size_t e = 0; e < ranks.size(); ++e) {
    if (pairs[e].empty() || (ranks[e] == 0 && !rank_zero_too)) continue;
    const at::Tensor p = at::tensor(pairs[e], at::kLong);
    out.push_back({static_cast<int64_t>(e), p.floor_divide(slots), p});
  }
  return out;
}

at::Tensor bytes_for(size_t count) { return at::empty({static_cast<int64_t>(count) + 64}, at::kByte); }
moraine::kernels::Workspace view(const at::Tensor& bytes) {
  return {bytes.data_ptr(), static_cast<size_t>(bytes.numel())};
}
moraine::kernels::DType kernel_dtype(at::ScalarType type) {
  return type == at::kBFloat16 ? moraine::kernels::DType::kBF16 : moraine::kernels::DType::kF32;
}

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

void time_interleaved(std::vector<Contender>& all, double budget_s) {
  for (Contender& c : all) c.run(0);  // warm-up
  const auto start = now_s();
  for (size_t round = 0; round < 7 || (round < 25 && seconds_since(start) < budget_s); ++round) {
    for (Contender& c : all) {
      const auto begin = now_s();
      c.run(round + 1);
      c.ms.push_back(seconds_since(begin) * 1e3);
    }
    if (round >= 2 && seconds_since(start) > 4 * budget_s) break;  // huge cells: fewer rounds, said by the spread
  }
}

void print_header() {
  std::printf(
      "| case | T | E, k | ranks, routing | dtype | ms (min-max) | GFLOP/s | GB/s | floor, ms (Compute or Memory) | %% "
      "of floor |");
  for (const char* name : kBaselines) std::printf(" x %s |", name);
  std::printf(" rel. error |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n");
}

void print_cell(const Cell& cell, const std::vector<Contender>& all, const Peaks& peaks) {
  const double compute_ms = cell.flops / peaks.gflops / 1e6, memory_ms = cell.bytes / peaks.gbps / 1e6;
  const double floor_ms = std::max(compute_ms, memory_ms), mine = median(all[0].ms);
  std::printf("| %s | %ld | %ld, %ld | %s | %s | %.3f (%.3f-%.3f) | %.1f | %.1f | %.3f %c | %.0f |", cell.what.c_str(),
              cell.tokens, cell.experts, cell.slots, cell.ranks.c_str(), cell.dtype == at::kFloat ? "fp32" : "bf16",
              mine, *std::min_element(all[0].ms.begin(), all[0].ms.end()),
              *std::max_element(all[0].ms.begin(), all[0].ms.end()), cell.flops / mine / 1e6, cell.bytes / mine / 1e6,
              floor_ms, compute_ms > memory_ms ? 'C' : 'M', 100 * floor_ms / mine);
  for (const char* name : kBaselines) {
    const auto found = std::find_if(all.begin(), all.end(), [&](const Contender& x) { return x.name == name; });
    if (found == all.end()) {
      std::printf(" n/a |");
    } else {
      std::printf(" %.2f |", median(found->ms) / mine);
    }
  }
  std::printf(" %.1e |\n", cell.error);
  std::fflush(stdout);
}

}  // namespace bench
