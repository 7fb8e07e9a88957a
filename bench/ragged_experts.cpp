// Ragged-rank expert kernels against every way of doing the same with ATen, on the CPU, all in one run.
//
// Contenders run interleaved (ours B1 B2 .. ours B1 B2 ..), medians are printed as a Markdown table, ratios are baseline / ours;
// peaks are measured before and after. One thread is timed by its processor time, several by the wall clock. The floor of a line
// is max(FLOP / measured FMA peak, bytes / measured read bandwidth).
//   B1 per-expert loop: index_select, mm, mm, mul, index_add     B2 zero-pad to the largest rank and token count, two bmm
//   B3 as PEFT does it: dtype casts and boolean indexing         B5 all ranks for all tokens, masked
//   B6 one dense matrix per expert                               B7 the frozen layer alone (context, not a contender)
// B4 (grouped_mm) exists on GPUs only and prints n/a.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/index_add.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <CLI/CLI.hpp>
#include <immintrin.h>
#include <omp.h>

#include "kernels/ffn_expert.h"
#include "kernels/layout.h"
#include "kernels/ragged_delta.h"
#include "kernels/rankwise.h"

namespace {

namespace mk = moraine::kernels;
using at::Tensor;

// With one thread, time is this thread's processor time: on a shared machine the wall clock counts the neighbours' work.
bool use_cpu_time = true;
double now_s() {
  timespec t{};
  clock_gettime(use_cpu_time ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}
double seconds_since(double start) { return now_s() - start; }

// ---- peaks ---------------------------------------------------------------------------------------------------------

__attribute__((target("avx2,fma"))) double fma_gflops() {
  __m256 c[12];
  for (int i = 0; i < 12; ++i) c[i] = _mm256_set1_ps(1.0f);
  const __m256 a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(0.5f);  // 1 is a fixed point: no denormals, no overflow
  const int64_t rounds = 10'000'000;
  const double start = now_s();
  for (int64_t r = 0; r < rounds; ++r) {  // twelve independent chains hide the latency; asm keeps them in registers
#define CHAIN(i) asm volatile("vfmadd132ps %1, %2, %0" : "+x"(c[i]) : "x"(a), "x"(b))
    CHAIN(0); CHAIN(1); CHAIN(2); CHAIN(3); CHAIN(4); CHAIN(5);
    CHAIN(6); CHAIN(7); CHAIN(8); CHAIN(9); CHAIN(10); CHAIN(11);
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

struct Peaks {
  double gflops = 0, gbps = 0;
};
Peaks measure_peaks(const char* when, int threads) {
  Peaks one{fma_gflops(), read_gbps()};
  std::printf("Peaks %s: 1 thread %.0f GFLOP/s FMA (fp32, AVX2), %.1f GB/s read, %.1f GB/s copy", when, one.gflops, one.gbps, copy_gbps());
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

// ---- cases ---------------------------------------------------------------------------------------------------------

struct RankSet {
  std::string name;
  std::vector<int64_t> ranks;
};
std::vector<int64_t> repeat_to(std::vector<int64_t> ranks, int64_t experts) {
  std::vector<int64_t> out;
  for (int64_t e = 0; e < experts; ++e) out.push_back(ranks[static_cast<size_t>(e) % ranks.size()]);
  return out;
}
const std::vector<RankSet> kRankSets{{"uniform16", {16}},
                                     {"small8", {1, 2, 4, 8, 8, 16, 16, 32}},
                                     {"mix8", {1, 4, 16, 32, 64, 256, 1024, 2048}},
                                     {"ladder", {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048}},
                                     {"flexmore_v02", {0, 64, 64, 32, 32, 16, 16}},
                                     {"flexmore_best", {0, 1024, 1024, 256, 64, 8, 4}}};

std::vector<int32_t> draw_route(const std::string& kind, int64_t tokens, int64_t slots, int64_t experts, std::mt19937& engine) {
  std::vector<double> mass(static_cast<size_t>(experts), 1.0);
  for (size_t e = 0; e < mass.size() && kind == "zipf"; ++e) mass[e] = 1 / std::pow(static_cast<double>(e + 1), 1.2);
  std::discrete_distribution<int32_t> draw(mass.begin(), mass.end());
  std::vector<int32_t> index;
  for (int64_t t = 0; t < tokens; ++t) {  // distinct experts within a token, as a router picks them
    std::vector<int32_t> chosen;
    while (static_cast<int64_t>(chosen.size()) < slots) {
      const int32_t e = kind == "one" ? static_cast<int32_t>((experts - 1 + static_cast<int64_t>(chosen.size())) % experts) : draw(engine);
      if (std::find(chosen.begin(), chosen.end(), e) == chosen.end()) chosen.push_back(e);
    }
    index.insert(index.end(), chosen.begin(), chosen.end());
  }
  return index;
}

struct Case {
  int64_t tokens, experts, slots, d_in, d_out;
  std::string ranks_name, routing;
  std::vector<int64_t> ranks, offsets;
  at::ScalarType dtype;
  std::vector<int32_t> index;
  std::vector<Tensor> x;  // rotated, so that inputs come from memory
  Tensor a, bt, y0, dy, gates, scale, weight;
  int64_t total_rank() const { return offsets.back(); }
  double work() const {  // sum over pairs of the rank
    double sum = 0;
    for (const int32_t e : index) sum += static_cast<double>(ranks[static_cast<size_t>(e)]);
    return sum;
  }
  double active_rank() const {
    double sum = 0;
    for (int64_t e = 0; e < experts; ++e)
      if (std::find(index.begin(), index.end(), e) != index.end()) sum += static_cast<double>(ranks[static_cast<size_t>(e)]);
    return sum;
  }
};

mk::DType kernel_dtype(at::ScalarType t) { return t == at::kBFloat16 ? mk::DType::kBF16 : mk::DType::kF32; }

Case make_case(int64_t tokens, int64_t experts, int64_t slots, int64_t d_in, int64_t d_out, const RankSet& set,
               const std::string& routing, at::ScalarType dtype) {
  Case c{tokens, experts, slots, d_in, d_out, set.name, routing, repeat_to(set.ranks, experts), {0}, dtype, {}, {}, {}, {}, {}, {}, {}, {}, {}};
  for (const int64_t r : c.ranks) c.offsets.push_back(c.offsets.back() + r);
  std::mt19937 engine(static_cast<unsigned>(tokens * 131 + experts));
  c.index = draw_route(routing, tokens, slots, experts, engine);
  const auto rows = [&](int64_t n, int64_t d) { return (at::randn({n, d}) / std::sqrt(static_cast<double>(d))).to(dtype); };
  const int64_t sets = std::max<int64_t>(1, std::min<int64_t>(8, (64 << 20) / (tokens * d_in * 4)));
  for (int64_t i = 0; i < sets; ++i) c.x.push_back(at::randn({tokens, d_in}).to(dtype));
  c.a = rows(c.total_rank(), d_in), c.bt = rows(c.total_rank(), d_out);
  c.y0 = at::randn({tokens, d_out}).to(dtype), c.dy = at::randn({tokens, d_out}).to(dtype);
  c.gates = at::randn({tokens, slots}).sigmoid();
  c.scale = at::zeros({experts}) + 1.0;
  c.weight = rows(d_out, d_in);
  return c;
}

// ---- ours ----------------------------------------------------------------------------------------------------------

struct Ours {
  const Case& c;
  mk::Exec exec;
  mk::RaggedExperts experts;
  Tensor route_space, saved, space, y, dx, da, dbt, dgates;

  explicit Ours(const Case& case_) : c(case_) {
    exec.check_inputs = true;
    experts = {c.experts, c.d_in, c.d_out, kernel_dtype(c.dtype), c.a.data_ptr(), c.bt.data_ptr(), c.offsets.data(), nullptr,
               c.scale.data_ptr<float>()};
    const auto bytes = [](size_t n) { return at::empty({static_cast<int64_t>(n) + 64}, at::kByte); };
    route_space = bytes(mk::route_bytes(c.tokens, c.slots, c.experts, mk::Device::kCpu));
    saved = bytes(mk::delta_saved_bytes(experts, c.tokens * c.slots, mk::Device::kCpu));
    space = bytes(std::max(mk::delta_forward_workspace(experts, c.tokens, c.slots, exec),
                           mk::delta_backward_workspace(experts, c.tokens, c.slots, exec)));
    y = at::empty_like(c.y0), dx = at::empty_like(c.x[0]);
    da = at::empty({c.total_rank(), c.d_in}), dbt = at::empty({c.total_rank(), c.d_out}), dgates = at::empty_like(c.gates);
  }
  static mk::Workspace view(const Tensor& t) { return {t.data_ptr(), static_cast<size_t>(t.numel())}; }
  Tensor run(size_t set, bool backward) {
    const Tensor& x = c.x[set % c.x.size()];
    const mk::Route route = mk::route_build(c.index.data(), c.tokens, c.slots, c.experts, view(route_space), exec);
    mk::delta_forward({&experts, &route, c.gates.data_ptr(), {x.data_ptr(), c.d_in}, {c.y0.data_ptr(), c.d_out},
                       {y.data_ptr(), c.d_out}, backward ? saved.data_ptr() : nullptr},
                      view(space), exec);
    if (backward)
      mk::delta_backward({&experts, &route, c.gates.data_ptr(), {x.data_ptr(), c.d_in}, {c.dy.data_ptr(), c.d_out}, {},
                          saved.data_ptr(), {dx.data_ptr(), c.d_in}, dgates.data_ptr(), da.data_ptr(), dbt.data_ptr(), false},
                         view(space), exec);
    return y;
  }
};

// ---- baselines -----------------------------------------------------------------------------------------------------

struct Segment {
  int64_t expert;
  Tensor tokens, pairs;  // long
};
std::vector<Segment> segments_of(const Case& c) {
  std::vector<std::vector<int64_t>> pairs(static_cast<size_t>(c.experts));
  for (size_t p = 0; p < c.index.size(); ++p) pairs[static_cast<size_t>(c.index[p])].push_back(static_cast<int64_t>(p));
  std::vector<Segment> out;
  for (int64_t e = 0; e < c.experts; ++e) {
    const auto& mine = pairs[static_cast<size_t>(e)];
    if (mine.empty() || c.ranks[static_cast<size_t>(e)] == 0) continue;
    const Tensor p = at::tensor(mine, at::kLong);
    out.push_back({e, p.floor_divide(c.slots), p});
  }
  return out;
}

struct Inputs {
  Tensor x, a, bt, gates;
};
using Forward = std::function<Tensor(const Inputs&)>;

Tensor slab(const Tensor& w, const Case& c, int64_t e) {
  return w.narrow(0, c.offsets[static_cast<size_t>(e)], c.ranks[static_cast<size_t>(e)]);
}

// Rebuilds the segments on every call, as a caller would after each routing decision.
Tensor loop(const Case& c, const Inputs& in) {
  Tensor y = c.y0.to(in.x.scalar_type());
  const Tensor gates = in.gates.flatten();
  for (const Segment& s : segments_of(c)) {
    const Tensor u = at::mm(at::index_select(in.x, 0, s.tokens), slab(in.a, c, s.expert).t());
    const Tensor out = at::mm(u, slab(in.bt, c, s.expert)) * at::index_select(gates, 0, s.pairs).unsqueeze(1).to(y.scalar_type());
    y = at::index_add(y, 0, s.tokens, out);
  }
  return y;
}

Tensor padded(const Case& c, const Inputs& in, const Tensor& a_pad, const Tensor& bt_pad) {
  const std::vector<Segment> all = segments_of(c);
  int64_t most = 0;
  for (const Segment& s : all) most = std::max(most, s.tokens.numel());
  Tensor x_pad = at::zeros({c.experts, most, c.d_in}, in.x.options());
  for (const Segment& s : all) x_pad.select(0, s.expert).narrow(0, 0, s.tokens.numel()).copy_(at::index_select(in.x, 0, s.tokens));
  const Tensor out = at::bmm(at::bmm(x_pad, a_pad.transpose(1, 2)), bt_pad);
  Tensor y = c.y0;
  const Tensor gates = in.gates.flatten();
  for (const Segment& s : all)
    y = at::index_add(y, 0, s.tokens, out.select(0, s.expert).narrow(0, 0, s.tokens.numel()) *
                                          at::index_select(gates, 0, s.pairs).unsqueeze(1).to(y.scalar_type()));
  return y;
}

Tensor peft_like(const Case& c, const Inputs& in) {
  Tensor y = c.y0;
  const Tensor index = at::tensor(std::vector<int64_t>(c.index.begin(), c.index.end()), at::kLong).view({c.tokens, c.slots});
  for (int64_t e = 0; e < c.experts; ++e) {
    if (c.ranks[static_cast<size_t>(e)] == 0) continue;
    const Tensor chosen = index == e;
    const Tensor rows = at::nonzero(chosen.any(1)).flatten();
    if (rows.numel() == 0) continue;
    const Tensor weight = at::mul(in.gates, chosen).sum(1).index_select(0, rows).unsqueeze(1);
    const Tensor part = in.x.index_select(0, rows).to(at::kFloat).to(slab(in.a, c, e).scalar_type());
    const Tensor out = at::mm(at::mm(part, slab(in.a, c, e).t()), slab(in.bt, c, e)).to(at::kFloat) * weight;
    y = y.index_add(0, rows, out.to(y.scalar_type()));
  }
  return y;
}

Tensor masked_dense(const Case& c, const Inputs& in) {
  Tensor mask = at::zeros({c.tokens, c.total_rank()}, in.x.options());
  for (const Segment& s : segments_of(c))
    mask.narrow(1, c.offsets[static_cast<size_t>(s.expert)], c.ranks[static_cast<size_t>(s.expert)])
        .index_copy_(0, s.tokens, in.gates.flatten().index_select(0, s.pairs).unsqueeze(1).to(mask.scalar_type()).expand({-1, c.ranks[static_cast<size_t>(s.expert)]}));
  return c.y0 + at::mm(at::mm(in.x, in.a.t()) * mask, in.bt);
}

Tensor materialised(const Case& c, const Inputs& in, const std::vector<Tensor>& dense) {
  Tensor y = c.y0;
  for (const Segment& s : segments_of(c))
    y = at::index_add(y, 0, s.tokens, at::mm(at::index_select(in.x, 0, s.tokens), dense[static_cast<size_t>(s.expert)].t()) *
                                          at::index_select(in.gates.flatten(), 0, s.pairs).unsqueeze(1).to(y.scalar_type()));
  return y;
}

constexpr const char* kBaselines[] = {"B1", "B2", "B3", "B4", "B5", "B6", "B7"};

struct Contender {
  std::string name;
  std::function<Tensor(size_t)> run;
  std::vector<double> ms;
};

std::function<Tensor(size_t)> with_autograd(const Case& c, bool backward, Forward forward) {
  return [&c, backward, forward](size_t set) {
    Inputs in{c.x[set % c.x.size()], c.a, c.bt, c.gates};
    if (!backward) {
      const at::NoGradGuard no_grad;
      return forward(in);
    }
    for (Tensor* t : {&in.x, &in.a, &in.bt, &in.gates}) *t = t->detach().set_requires_grad(true);
    const Tensor y = forward(in);
    y.backward(c.dy);
    return y.detach();
  };
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

void run_delta_case(const Case& c, bool backward, const Peaks& peaks, double budget_s, bool few) {
  Ours ours(c);
  std::vector<Contender> all;
  all.push_back({"ours", [&](size_t set) { return ours.run(set, backward); }, {}});
  all.push_back({"B1", with_autograd(c, backward, [&](const Inputs& in) { return loop(c, in); }), {}});
  Tensor a_pad, bt_pad;
  std::vector<Tensor> dense;
  const int64_t widest = *std::max_element(c.ranks.begin(), c.ranks.end());
  const double element = c.dtype == at::kFloat ? 4 : 2;
  if (!few && !backward && static_cast<double>(c.experts * widest * (c.d_in + c.d_out)) * element < 2e9) {
    a_pad = at::zeros({c.experts, widest, c.d_in}, c.a.options()), bt_pad = at::zeros({c.experts, widest, c.d_out}, c.bt.options());
    for (int64_t e = 0; e < c.experts; ++e) {
      a_pad.select(0, e).narrow(0, 0, c.ranks[static_cast<size_t>(e)]).copy_(slab(c.a, c, e));
      bt_pad.select(0, e).narrow(0, 0, c.ranks[static_cast<size_t>(e)]).copy_(slab(c.bt, c, e));
    }
    all.push_back({"B2", with_autograd(c, false, [&](const Inputs& in) { return padded(c, in, a_pad, bt_pad); }), {}});
  }
  all.push_back({"B3", with_autograd(c, backward, [&](const Inputs& in) { return peft_like(c, in); }), {}});
  if (!few) all.push_back({"B5", with_autograd(c, backward, [&](const Inputs& in) { return masked_dense(c, in); }), {}});
  if (!few && !backward && static_cast<double>(c.experts * c.d_in * c.d_out) * element < 1.2e9) {
    for (int64_t e = 0; e < c.experts; ++e) dense.push_back(at::mm(slab(c.bt, c, e).t(), slab(c.a, c, e)));
    all.push_back({"B6", with_autograd(c, false, [&](const Inputs& in) { return materialised(c, in, dense); }), {}});
  }
  all.push_back({"B7", with_autograd(c, false, [&](const Inputs& in) { return at::mm(in.x, c.weight.t()); }), {}});
  time_interleaved(all, budget_s);

  double error = 0;
  {
    const at::NoGradGuard no_grad;
    const Tensor ref = loop(c, {c.x[0].to(at::kDouble), c.a.to(at::kDouble), c.bt.to(at::kDouble), c.gates.to(at::kDouble)});
    error = ((ours.run(0, backward).to(at::kDouble) - ref).norm() / ref.norm()).item<double>();
  }
  const double passes = backward ? 3 : 1;  // backward does each product twice
  const double flops = 2.0 * static_cast<double>(c.d_in + c.d_out) * c.work() * passes;
  const double bytes = element * (static_cast<double>(c.d_in + c.d_out) * c.active_rank() +
                                  static_cast<double>(c.tokens * (c.d_in + 2 * c.d_out))) * passes;
  const double compute_ms = flops / peaks.gflops / 1e6, memory_ms = bytes / peaks.gbps / 1e6;
  const double floor_ms = std::max(compute_ms, memory_ms), mine = median(all[0].ms);
  std::printf("| O1 %ldx%ld %s | %ld | %ld, %ld | %s %s | %s | %.3f (%.3f-%.3f) | %.1f | %.1f | %.3f %c | %.0f |", c.d_in, c.d_out,
              backward ? "fwd+bwd" : "fwd", c.tokens, c.experts, c.slots, c.ranks_name.c_str(), c.routing.c_str(),
              c.dtype == at::kFloat ? "fp32" : "bf16", mine, *std::min_element(all[0].ms.begin(), all[0].ms.end()),
              *std::max_element(all[0].ms.begin(), all[0].ms.end()), flops / mine / 1e6, bytes / mine / 1e6, floor_ms,
              compute_ms > memory_ms ? 'C' : 'M', 100 * floor_ms / mine);
  for (const char* name : kBaselines) {
    const auto found = std::find_if(all.begin(), all.end(), [&](const Contender& x) { return x.name == name; });
    if (found == all.end()) {
      std::printf(" n/a |");
    } else {
      std::printf(" %.2f |", median(found->ms) / mine);
    }
  }
  std::printf(" %.1e |\n", error);
  std::fflush(stdout);
}

void print_header() {
  std::printf("| case | T | E, k | ranks, routing | dtype | ms (min-max) | GFLOP/s | GB/s | floor, ms (Compute or Memory) | %% of floor |");
  for (const char* name : kBaselines) std::printf(" x %s |", name);
  std::printf(" rel. error |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n");
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Ragged-rank expert kernels against ATen"};
  int threads = 1;
  double budget_s = 1.0;
  std::vector<int64_t> tokens{1, 16, 64, 256};
  std::vector<std::string> rank_sets, dtypes{"fp32", "bf16"}, routings{"uniform"}, directions{"fwd", "fwd+bwd"};
  int64_t experts = 8, slots = 2, d_in = 4096, d_out = 4096;
  bool few = false;
  app.add_option("--threads", threads, "threads for all contenders (1 is the primary number)");
  app.add_option("--tokens", tokens, "tokens per call");
  app.add_option("--ranks", rank_sets, "names of rank sets; all when absent");
  app.add_option("--dtype", dtypes, "fp32, bf16");
  app.add_option("--routing", routings, "uniform, zipf, one");
  app.add_option("--direction", directions, "fwd, fwd+bwd");
  app.add_option("--experts", experts);
  app.add_option("--slots", slots);
  app.add_option("--d-in", d_in);
  app.add_option("--d-out", d_out);
  app.add_option("--budget", budget_s, "seconds per cell");
  app.add_flag("--few", few, "only B1, B3 and B7");
  CLI11_PARSE(app, argc, argv);
  at::set_num_threads(threads);
  omp_set_num_threads(threads);
  use_cpu_time = threads == 1;
  std::printf("Path %s, threads %d, %s time.\n\n```\n%s```\n\n", mk::path_name(mk::best_path()), threads, use_cpu_time ? "processor" : "wall",
              at::show_config().c_str());
  const Peaks peaks = measure_peaks("before", threads);
  std::printf("\n");
  print_header();
  for (const std::string& dtype : dtypes)
    for (const RankSet& set : kRankSets) {
      if (!rank_sets.empty() && std::find(rank_sets.begin(), rank_sets.end(), set.name) == rank_sets.end()) continue;
      const int64_t e = set.name.rfind("flexmore", 0) == 0 ? 7 : set.name == "ladder" ? 12 : experts;
      for (const std::string& routing : routings)
        for (const int64_t t : tokens) {
          const Case c = make_case(t, e, slots, d_in, d_out, set, routing, dtype == "fp32" ? at::kFloat : at::kBFloat16);
          for (const std::string& direction : directions) run_delta_case(c, direction == "fwd+bwd", peaks, budget_s, few);
        }
    }
  std::printf("\n");
  measure_peaks("after", threads);
  return 0;
}
