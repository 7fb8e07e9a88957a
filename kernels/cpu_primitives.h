#pragma once

#include "kernels/backend.h"
#include "kernels/cpu_combine.h"
#include "kernels/cpu_ffn.h"
#include "kernels/cpu_selected.h"

/// The backend primitives on the CPU, as templates; each cpu_<family>.cpp instantiates them for its vector type. Every
/// output element is computed by one task, and how work is cut into tasks depends on shapes only, never on the number
/// of threads.
namespace moraine::kernels {
namespace {

template <class V, class S>
struct Cpu : CpuCommon<V, S> {
  using Base = CpuCommon<V, S>;
  using Base::columns;
  using Base::flops_of;
  using Base::load;
  using Base::rank_of;
  using Base::row;
  using Base::scratch_of;
  using Base::store;
  using typename Base::Acc;
  using typename Base::G;

  static size_t segments_bytes(int64_t experts) { return static_cast<size_t>(experts + 1) * sizeof(int64_t); }

  static Segments make_segments(const Route& route, const int64_t* row_offsets, int64_t max_rank, void* storage,
                                const Exec&) {
    auto* pair_offsets = static_cast<int64_t*>(storage);
    pair_offsets[0] = 0;
    for (int64_t e = 0; e < route.experts; ++e)
      pair_offsets[e + 1] = pair_offsets[e] + (route.offsets[e + 1] - route.offsets[e]) *
                                                  padded_rank(row_offsets[e + 1] - row_offsets[e]);
    return {row_offsets, pair_offsets, nullptr, nullptr, nullptr, max_rank};
  }

  // Thread scratch, then the partial sums of <h, q>.
  static size_t scratch_bytes(int64_t pairs, int64_t /*max_rank*/, int64_t max_width) {
    return static_cast<size_t>(max_task_threads()) * sizeof(ThreadScratch) +
           static_cast<size_t>(pairs * ceil_div(max_width, kHiddenStrip)) * sizeof(Acc);
  }
  static void weights(const WeightsArgs& a, const Exec&) {
    auto* weighted = static_cast<Acc*>(a.weighted);
    auto* scaled = static_cast<Acc*>(a.scaled);
    const auto* gates = static_cast<const Acc*>(a.gates);
    for (int64_t p = 0; p < a.route->pairs(); ++p) weighted[p] = scaled[p] = 0;
    for (int64_t e = 0; e < a.route->experts; ++e)
      for (int64_t s = a.route->offsets[e]; s < a.route->offsets[e + 1]; ++s) {
        const int32_t p = a.route->perm[s];
        scaled[p] = static_cast<Acc>(a.scale[e]);
        weighted[p] = gates[p] * scaled[p];
      }
  }

  static void gather(const ShrinkArgs& a) {
    const auto copy = [&](int64_t e, int) {
      const int64_t rank = rank_of(a.segments, e), ld = padded_rank(rank);
      Acc* out = static_cast<Acc*>(a.out) + a.segments.pair_offsets[e];
      for (int64_t s = a.route->offsets[e]; s < a.route->offsets[e + 1]; ++s, out += ld) {
        const S* from = row(a.x, *a.route, s);
        for (int64_t i = 0; i < ld; ++i) out[i] = i < rank ? widen(from[i]) : Acc(0);
      }
    };
    for_each_task(a.route->experts, flops_of(*a.route, a.segments, 1), copy);
  }

  static void shrink(const ShrinkArgs& a, void* scratch, const Exec&) {
    if (a.matrix == nullptr) return gather(a);
    const Route& route = *a.route;
    const auto tasks_of = [&](int64_t e) {
      return ceil_div(route.offsets[e + 1] - route.offsets[e], kTokenBlock) *
             ceil_div(rank_of(a.segments, e), kRankBlock);
    };
    int64_t tasks = 0;
    for (int64_t e = 0; e < route.experts; ++e) tasks += tasks_of(e);
    const auto body = [&](int64_t task, int thread) {
      int64_t e = 0;
      for (; task >= tasks_of(e); ++e) task -= tasks_of(e);
      const int64_t rank_blocks = ceil_div(rank_of(a.segments, e), kRankBlock);
      shrink_block(a, e, task / rank_blocks * kTokenBlock, task % rank_blocks * kRankBlock,
                   scratch_of(scratch, thread));
    };
    for_each_task(tasks, flops_of(route, a.segments, a.width), body);
  }

  static void shrink_block(const ShrinkArgs& a, int64_t e, int64_t first_row, int64_t first_rank,
                           ThreadScratch& scratch) {
    const Route& route = *a.route;
    const int64_t rank = rank_of(a.segments, e), ld = padded_rank(rank);
    const int64_t begin = route.offsets[e] + first_row;
    const int64_t rows = smaller<int64_t>(kTokenBlock, route.offsets[e + 1] - begin);
    const int64_t ranks = smaller(kRankBlock, rank - first_rank);
    Acc* out = static_cast<Acc*>(a.out) + a.segments.pair_offsets[e] + first_row * ld + first_rank;
    const S* x[kTokenBlock];
    const S* m[kRankBlock];
    const S* soon[kStayRanks + kTokenBlock];  // of the next chunk
    // Rows a power of two apart share cache sets: copy the chunk when rank tiles will read it again and again.
    constexpr int64_t kStride = kChunk + 64 / static_cast<int64_t>(sizeof(S));
    static_assert(kTokenBlock * kStride * sizeof(S) <= 2 * kBufferBytes);
    const bool copy = rows > 8 && ranks > kStayRanks;
    S* packed = reinterpret_cast<S*>(scratch.buffer[0]);
    for (int64_t c = 0; c < a.width; c += kChunk) {
      const int64_t len = smaller(kChunk, a.width - c);
      for (int64_t i = 0; i < rows; ++i) {
        x[i] = row(a.x, route, begin + i) + c;
        if (copy) {
          std::memcpy(packed + i * kStride, x[i], static_cast<size_t>(len) * sizeof(S));
          x[i] = packed + i * kStride;
        }
      }
      for (int64_t i = 0; i < ranks; ++i)
        m[i] = static_cast<const S*>(a.matrix) + (a.segments.row_offsets[e] + first_rank + i) * a.width + c;
      int64_t num_soon = 0;
      if (c + kChunk < a.width && ranks <= kStayRanks) {
        for (int64_t i = 0; i < ranks; ++i) soon[num_soon++] = m[i] + kChunk;
        for (int64_t i = 0; i < rows; ++i) soon[num_soon++] = x[i] + kChunk;
      }
      G::dot_rows(x, rows, m, ranks, len, out, ld, c > 0, soon, num_soon);
    }
    if (first_rank + ranks == rank)
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t r = a.width > 0 ? ranks : 0; r < ld - first_rank; ++r) out[i * ld + r] = 0;
  }

  static void outer(const OuterArgs& a, void* scratch, const Exec&) {
    const Route& route = *a.route;
    const int64_t strips = ceil_div(a.width, kOuterStrip);
    const auto body = [&](int64_t task, int thread) {
      const int64_t e = task / strips, c0 = task % strips * kOuterStrip;
      const int64_t width = smaller(kOuterStrip, a.width - c0), rank = rank_of(a.segments, e);
      const int64_t begin = route.offsets[e], n = route.offsets[e + 1] - begin;
      const Acc* pairs = static_cast<const Acc*>(a.pairs) + a.segments.pair_offsets[e];
      Acc* out = static_cast<Acc*>(a.out) + a.segments.row_offsets[e] * a.width + c0;
      const auto q_row = [&](int64_t k) { return row(a.rows, route, begin + k) + c0; };
      const auto c_row = [&](int64_t m) { return out + m * a.width; };
      if (n == 0 && a.grads == WeightGrads::kChosenOnly) return;
      G::multiply_rows(
          rank, width, n, [&](int64_t m) { return pairs + m; }, padded_rank(rank), q_row, c_row,
          a.grads == WeightGrads::kAccumulate, scratch_of(scratch, thread).panel);
    };
    for_each_task(route.experts * strips, flops_of(route, a.segments, a.width), body);
  }

  static void scale_pairs(const ScalePairsArgs& a, const Exec&) {
    const Route& route = *a.route;
    const auto* weights = static_cast<const Acc*>(a.weights);
    auto* dot = static_cast<Acc*>(a.dot);
    if (dot != nullptr && !a.accumulate_dot)
      for (int64_t p = 0; p < route.pairs(); ++p) dot[p] = 0;
    const auto body = [&](int64_t e, int) {
      const int64_t ld = padded_rank(rank_of(a.segments, e));
      for (int64_t s = route.offsets[e]; s < route.offsets[e + 1] && ld > 0; ++s) {
        const int64_t at = a.segments.pair_offsets[e] + (s - route.offsets[e]) * ld;
        const int32_t p = route.perm[s];
        const Acc w = weights[p];
        const Acc* u = a.u == nullptr ? nullptr : static_cast<const Acc*>(a.u) + at;
        const Acc* v = static_cast<const Acc*>(a.v) + at;
        if (dot != nullptr) {
          auto sum = V::zero();
          columns(ld, [&](int64_t c, int n) { sum = V::fma(load(u + c, n), load(v + c, n), sum); });
          dot[p] += static_cast<Acc>(a.scale[e]) * V::sum(sum);
        }
        scale_row(u, w, a.out_u, at, ld);
        scale_row(v, w, a.out_v, at, ld);
      }
    };
    for_each_task(route.experts, flops_of(route, a.segments, 4), body);
  }
  static void scale_row(const Acc* from, Acc w, void* out, int64_t at, int64_t ld) {
    if (out == nullptr) return;
    Acc* to = static_cast<Acc*>(out) + at;
    columns(ld, [&](int64_t c, int n) { store(to + c, V::mul(V::set1(w), load(from + c, n)), n); });
  }

  static void mask(const MaskArgs& a, const Exec&) {
    const auto *u = static_cast<const Acc*>(a.u), *v = static_cast<const Acc*>(a.v),
               *m = static_cast<const Acc*>(a.mask);
    auto *masked_u = static_cast<Acc*>(a.masked_u), *masked_v = static_cast<Acc*>(a.masked_v);
    auto* dmask = static_cast<Acc*>(a.dmask);
    const Acc scale = static_cast<Acc>(a.scale);
    for (int64_t i = 0; i < a.tokens * a.row; ++i) {
      // Not selected means not touched: 0 x NaN must not leak through the mask.
      if (masked_u != nullptr) masked_u[i] = m[i] == 0 ? Acc(0) : scale * u[i] * m[i];
      if (dmask != nullptr) dmask[i] = scale * u[i] * v[i];
      if (masked_v != nullptr) masked_v[i] = m[i] == 0 ? Acc(0) : scale * v[i] * m[i];
    }
  }

  static const Backend& table() {
    static const Backend backend{sizeof(Acc),
                                 segments_bytes,
                                 make_segments,
                                 scratch_bytes,
                                 weights,
                                 shrink,
                                 shrink,
                                 CpuCombine<V, S>::combine,
                                 outer,
                                 scale_pairs,
                                 CpuFfn<V, S>::ffn_hidden,
                                 CpuFfn<V, S>::ffn_hidden_backward,
                                 mask,
                                 &CpuSelected<V, S>::table()};
    return backend;
  }
};

}  // namespace
}  // namespace moraine::kernels
