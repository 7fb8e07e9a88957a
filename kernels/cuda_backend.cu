// CUDA backend: the primitives of backend.h launched on a stream; the kernels are in the headers it includes.
//
// Grids: products run persistently (cuda_gemm.cuh, cuda_wgmma.cuh), the rest one warp per pair or one block per token,
// both grid-stride. Outputs are overwritten (=) except outer with kAccumulate and dot, which are added to (+=) by their
// single owner. Nothing is allocated and nothing waits for the stream except where check_inputs asks for it; no
// floating-point atomics. Activations and weights must be 16-byte aligned with widths that are multiples of 8. Traffic:
// expand writes and combine reads 4 P width bytes of pair rows in scratch.
// Verified by running these kernels on the host, block by block, against the double oracle (tests/kernels), and on an
// H200 (scripts/gpu_check.sh; docs/results/gpu.md). What the host cannot show: speed, whether wgmma's descriptors,
// fences and barriers mean on hardware what the manual and its emulation say, and races that no switch of threads
// exposes.
#include <algorithm>
#include <cstdint>
#include <string>

#include "core/error.h"
#include "kernels/arena.h"
#include "kernels/backend.h"
#include "kernels/cuda_elementwise.cuh"
#include "kernels/cuda_gemm.cuh"
#include "kernels/cuda_problems.cuh"
#include "kernels/cuda_route.cuh"
#include "kernels/cuda_wgmma.cuh"

namespace moraine::kernels {
namespace {

using namespace device;

constexpr int64_t kSplitPairs = 1024;  // up to here a shrink is split over its chunks to fill the machine

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw core::Error(std::string("kernels: ") + what + ": " + cudaGetErrorString(error),
                      "see nvidia-smi and dmesg; rerun with CUDA_LAUNCH_BLOCKING=1 to find the first failing call",
                      core::kExitIo);
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

#if defined(MORAINE_CUDA_WGMMA)
constexpr bool kHasWgmma = true;
#else
constexpr bool kHasWgmma = false;
#endif

// The experts that take wgmma under `exec`. Throws UserError if it is asked for where it cannot run.
LargeTiles large_tiles(const Exec& exec, int64_t element_size) {
  if (exec.cuda_family != CudaFamily::kWgmma) return {};
  const char* hint = "leave the family at auto or mma, which take mma.sync (plain FMA for float)";
  if (element_size != 2)
    throw core::UserError("kernels/cuda: wgmma was asked for with float: it is for BF16 and F16", hint);
  int device_index = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device_index), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_index), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_index), "cudaDeviceGetAttribute");
  if (major != 9 || minor != 0)
    throw core::UserError("kernels/cuda: wgmma was asked for, but it needs compute capability 9.0: device " +
                              std::to_string(device_index) + " has " + std::to_string(major) + "." +
                              std::to_string(minor),
                          hint);
  if (!kHasWgmma)
    throw core::UserError("kernels/cuda: wgmma was asked for, but this build has no sm_90a code",
                          "configure with 90a in MORAINE_CUDA_ARCHS, or leave the family at auto");
  return {true, exec.wgmma_min_rank, exec.wgmma_min_pairs};
}

// Both classes of a product, each over its table; how many tiles there are is known on the device only.
template <class T, class Problem>
void run_tiles(const Problem& problem, const int32_t* table, const int32_t* large_table, int64_t max_rank,
               const Exec& exec) {
  const int64_t most = problem.most_tiles(max_rank, kBlock, kBlock);
  check(
      launch(tile_kernel<T, Problem>, grid(most, 4), kThreads, TileShape<T>::kShared, stream_of(exec), problem, table),
      "launch of a ragged product");
  if constexpr (sizeof(T) == 2) {
    if (large_table == nullptr) return;
    using Shape = WgmmaShape<Problem>;
    const int64_t most_large = problem.most_tiles(max_rank, Shape::kRows, Shape::kColumns);
    check(launch(wgmma_kernel<T, Problem>, grid(most_large, 1), kWgmmaThreads, Shape::kShared, stream_of(exec), problem,
                 large_table),
          "launch of a ragged product by wgmma");
  }
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
  static size_t segments_bytes(int64_t experts) {
    return static_cast<size_t>(experts + 1) * (sizeof(int64_t) + 6 * sizeof(int32_t));
  }

  static Segments make_segments(const Route& route, const int64_t* row_offsets, int64_t max_rank, void* storage,
                                const Exec& exec) {
    const int64_t n = route.experts + 1;
    auto* pair_offsets = static_cast<int64_t*>(storage);
    auto* tiles = reinterpret_cast<int32_t*>(pair_offsets + n);
    const TileTables small{kBlock, tiles, tiles + n, tiles + 2 * n};
    const TileTables large{kWgmmaRows, tiles + 3 * n, tiles + 4 * n, tiles + 5 * n};
    const LargeTiles rule = large_tiles(exec, sizeof(T));
    check(launch(segment_tables, 1, 32, 0, stream_of(exec), route.offsets, row_offsets, static_cast<int>(route.experts),
                 rule, pair_offsets, small, large),
          "launch of segment_tables");
    Segments out{row_offsets, pair_offsets, small.shrink, small.expand, small.outer, max_rank};
    if (rule.takes(route.pairs(), max_rank))  // else no expert can
      out.large_shrink_tiles = large.shrink, out.large_expand_tiles = large.expand, out.large_outer_tiles = large.outer;
    return out;
  }

  static int64_t splits_of(int64_t pairs, int64_t width) {
    return pairs <= kSplitPairs ? std::max<int64_t>(1, ceil_div(width, kSplitChunk)) : 1;
  }

  // Either the planes of a shrink or two sets of pair rows (a and b in inference, or one in float).
  static size_t scratch_bytes(int64_t pairs, int64_t max_rank, int64_t max_width) {
    const int64_t planes = splits_of(pairs, max_width) * pair_buffer_bound(pairs, max_rank);
    return sizeof(float) * static_cast<size_t>(std::max(planes, 2 * pairs * max_width));
  }

  static void weights(const WeightsArgs& a, const Exec& exec) {
    const Ragged g = ragged(*a.route, {});
    check(launch(pair_weights, grid(ceil_div(g.pairs, 256), 8), 256, 0, stream_of(exec), g,
                 static_cast<const float*>(a.gates), a.scale, static_cast<float*>(a.weighted),
                 static_cast<float*>(a.scaled)),
          "launch of pair_weights");
  }

  static int64_t pair_blocks(const Route& route) { return grid(ceil_div(route.pairs(), kRowThreads / 32), 16); }

  template <class Out>
  static void shrink_to(const ShrinkArgs& a, void* scratch, const Exec& exec) {
    const Ragged g = ragged(*a.route, a.segments);
    if (g.pairs == 0 || a.segments.max_rank == 0) return;
    const T* x = static_cast<const T*>(a.x.data);
    if (a.matrix == nullptr) {
      check(launch(gather_pairs<T, Out>, pair_blocks(*a.route), kRowThreads, 0, stream_of(exec), g, x, a.x.ld,
                   a.x.divisor, static_cast<Out*>(a.out)),
            "launch of gather_pairs");
      return;
    }
    const int64_t splits = splits_of(g.pairs, a.width), stride = pair_buffer_bound(g.pairs, a.segments.max_rank);
    auto* planes = static_cast<float*>(scratch);
    const ShrinkProblem<T> problem{g,
                                   x,
                                   a.x.ld,
                                   static_cast<int>(a.x.divisor),
                                   static_cast<const T*>(a.matrix),
                                   a.width,
                                   splits,
                                   splits == 1 ? a.width : kSplitChunk,
                                   planes,
                                   stride};
    run_tiles<T>(problem, a.segments.shrink_tiles, a.segments.large_shrink_tiles, a.segments.max_rank, exec);
    check(launch(sum_planes<Out>, pair_blocks(*a.route), kRowThreads, 0, stream_of(exec), g,
                 static_cast<const float*>(planes), stride, splits, static_cast<Out*>(a.out)),
          "launch of sum_planes");
  }
  static void shrink(const ShrinkArgs& a, void* scratch, const Exec& exec) { shrink_to<T>(a, scratch, exec); }
  static void shrink_unrounded(const ShrinkArgs& a, void* scratch, const Exec& exec) {
    shrink_to<float>(a, scratch, exec);
  }

  static void run_expand(const ExpandProblem<T>& problem, const Segments& segments, const Exec& exec) {
    run_tiles<T>(problem, segments.expand_tiles, segments.large_expand_tiles, segments.max_rank, exec);
  }

  static void expand_rows(const Route& route, const ExpandTerm& term, int64_t width, float* rows,
                          const int64_t* previous, const Exec& exec) {
    const Ragged g = ragged(route, term.segments);
    if (g.pairs == 0 || term.segments.max_rank == 0) return;
    const T* pairs = static_cast<const T*>(term.pairs);
    if (term.matrix == nullptr) {
      check(
          launch(spread_pairs<T>, pair_blocks(route), kRowThreads, 0, stream_of(exec), g, pairs, width, rows, previous),
          "launch of spread_pairs");
      return;
    }
    run_expand({g, pairs, static_cast<const T*>(term.matrix), width, rows, previous, nullptr, nullptr, 0, nullptr},
               term.segments, exec);
  }

  static void combine(const CombineArgs& a, void* scratch, const Exec& exec) {
    const Route& route = *a.route;
    if (route.tokens == 0) return;
    auto* rows = static_cast<float*>(scratch);
    for (int i = 0; i < a.num_terms; ++i)
      expand_rows(route, a.terms[i], a.width, rows, i == 0 ? nullptr : a.terms[0].segments.row_offsets, exec);
    check(launch(combine_rows<T>, grid(route.tokens, 16), kRowThreads, 0, stream_of(exec),
                 ragged(route, a.terms[0].segments), a.num_terms == 2 ? a.terms[1].segments.row_offsets : nullptr,
                 static_cast<const float*>(rows), static_cast<const float*>(a.weights), route.tokens, a.width,
                 static_cast<const T*>(a.y0.data), a.y0.ld, static_cast<T*>(a.y.data), a.y.ld),
          "launch of combine_rows");
  }

  static void outer(const OuterArgs& a, void*, const Exec& exec) {
    if (a.segments.max_rank == 0) return;
    const Ragged g = ragged(*a.route, a.segments);
    const OuterProblem<T> problem{g,
                                  static_cast<const T*>(a.pairs),
                                  static_cast<const T*>(a.rows.data),
                                  a.rows.ld,
                                  static_cast<int>(a.rows.divisor),
                                  a.width,
                                  static_cast<float*>(a.out),
                                  a.grads};
    run_tiles<T>(problem, a.segments.outer_tiles, a.segments.large_outer_tiles, a.segments.max_rank, exec);
  }

  static void scale_pairs(const ScalePairsArgs& a, const Exec& exec) {
    const Ragged g = ragged(*a.route, a.segments);
    if (g.pairs == 0) return;
    if (a.dot != nullptr && !a.accumulate_dot) cuda_zero(a.dot, static_cast<size_t>(g.pairs) * sizeof(float), exec);
    if (a.segments.max_rank == 0) return;
    check(launch(scale_pair_rows<T>, pair_blocks(*a.route), kRowThreads, 0, stream_of(exec), g,
                 static_cast<const T*>(a.u), static_cast<const float*>(a.v), static_cast<const float*>(a.weights),
                 a.scale, static_cast<T*>(a.out_u), static_cast<T*>(a.out_v), static_cast<float*>(a.dot)),
          "launch of scale_pair_rows");
  }

  static void ffn_hidden(const FfnHiddenArgs& a, void* scratch, const Exec& exec) {
    const Route& route = *a.route;
    if (route.tokens == 0) return;
    T* save_a = a.a != nullptr ? static_cast<T*>(a.a) : static_cast<T*>(scratch);
    T* save_b = a.b != nullptr ? static_cast<T*>(a.b) : static_cast<T*>(scratch) + route.pairs() * a.width;
    const auto activation = [&](const ExpandTerm& term, T* out, const ConstRows& base, const float* scale) {
      if (term.segments.max_rank == 0) return;
      run_expand({ragged(route, term.segments), static_cast<const T*>(term.pairs), static_cast<const T*>(term.matrix),
                  a.width, nullptr, nullptr, out, static_cast<const T*>(base.data), base.ld, scale},
                 term.segments, exec);
    };
    activation(a.gate, save_a, a.gate_base, a.gate_scale);
    activation(a.up, save_b, a.up_base, a.up_scale);
    check(launch(hidden_forward<T>, grid(route.tokens, 16), kRowThreads, 0, stream_of(exec),
                 ragged(route, a.gate.segments), a.up.segments.row_offsets, static_cast<const float*>(a.gates),
                 static_cast<const T*>(a.gate_base.data), a.gate_base.ld, static_cast<const T*>(a.up_base.data),
                 a.up_base.ld, route.tokens, a.width, save_a, save_b, static_cast<T*>(a.h),
                 static_cast<T*>(a.hidden_sum.data), a.hidden_sum.ld),
          "launch of hidden_forward");
  }

  static void ffn_hidden_backward(const FfnHiddenBackwardArgs& a, void* scratch, const Exec& exec) {
    const Route& route = *a.route;
    if (route.tokens == 0) return;
    auto* rows = static_cast<float*>(scratch);
    expand_rows(route, a.down, a.width, rows, nullptr, exec);
    check(launch(hidden_backward<T>, grid(route.tokens, 16), kRowThreads, 0, stream_of(exec),
                 ragged(route, a.down.segments), static_cast<const float*>(rows), static_cast<const float*>(a.gates),
                 static_cast<const T*>(a.q.data), a.q.ld, route.tokens, a.width, static_cast<const T*>(a.a),
                 static_cast<const T*>(a.b), static_cast<T*>(a.h), static_cast<T*>(a.da), static_cast<T*>(a.db),
                 static_cast<T*>(a.dgate_base.data), a.dgate_base.ld, static_cast<T*>(a.dup_base.data), a.dup_base.ld,
                 static_cast<float*>(a.dot)),
          "launch of hidden_backward");
  }

  static void mask(const MaskArgs& a, const Exec& exec) {
    const int64_t count = a.tokens * a.row;
    if (count == 0) return;
    check(launch(mask_ranks<T>, grid(ceil_div(count, 256), 8), 256, 0, stream_of(exec), count, a.scale,
                 static_cast<const float*>(a.u), static_cast<const float*>(a.v), static_cast<const float*>(a.mask),
                 static_cast<T*>(a.masked_u), static_cast<T*>(a.masked_v), static_cast<float*>(a.dmask)),
          "launch of mask_ranks");
  }

  static const Backend& table() {
    static const Backend backend{sizeof(T),  segments_bytes,      make_segments, scratch_bytes, weights,
                                 shrink,     shrink_unrounded,    combine,       outer,         scale_pairs,
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
    case DType::kF32:
      return &Cuda<float>::table();
    case DType::kBF16:
      return &Cuda<__nv_bfloat16>::table();
    case DType::kF16:
      return &Cuda<__half>::table();
    default:
      return nullptr;
  }
}

size_t cuda_route_bytes(int64_t tokens, int64_t slots, int64_t experts) {
  Arena arena;
  cut_route(arena, tokens * slots, experts);
  return arena.used();
}

Route cuda_route_build(const int32_t* index, int64_t tokens, int64_t slots, int64_t experts, Workspace storage,
                       const Exec& exec) {
  Arena arena(storage, "kernels/route");
  const int64_t pairs = tokens * slots, blocks = std::max<int64_t>(1, ceil_div(pairs, kRouteBlock));
  const RouteStorage s = cut_route(arena, pairs, experts);
  arena.check();
  const int64_t entries = (experts + 1) * blocks;
  cuda_zero(s.counts, static_cast<size_t>(entries) * sizeof(int32_t), exec);
  cuda_zero(s.status, sizeof(int32_t), exec);
  const int count = static_cast<int>(experts), width = static_cast<int>(blocks);
  check(launch(route_count, blocks, kRouteBlock, 0, stream_of(exec), index, pairs, count, width, s.counts, s.status),
        "launch of route_count");
  check(launch(route_scan, 1, kRouteBlock, 0, stream_of(exec), s.counts, entries, width, count, s.offsets),
        "launch of route_scan");
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
  check(launch(find_not_finite, grid(ceil_div(n, 256), 8), 256, 0, stream_of(exec), static_cast<const float*>(gates), n,
               found),
        "launch of find_not_finite");
  const int32_t bad = read_flag(found, exec);
  check(cudaFreeAsync(found, stream_of(exec)), "cudaFreeAsync");
  if (bad != 0)
    throw core::NumericError("kernels: a gate is not finite",
                             "check the router's logits: they or the tokens hold NaN or Inf");
}

}  // namespace moraine::kernels
