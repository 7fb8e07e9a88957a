#pragma once

#include "kernels/cpu_common.h"

/// Rank-wise products on the CPU that touch only the ranks a token selects. The bits are those of the dense primitives
/// over masked pair rows: what is left out there is multiplied by zero.
namespace moraine::kernels {
namespace {

constexpr int64_t kSelectedTokens = 64;   // of a task
constexpr int64_t kSelectedStrip = 1024;  // columns of a task
constexpr int64_t kSelectedRanks = 256;   // ranks of one token worked on at a time

template <class V, class S>
struct CpuSelected : CpuCommon<V, S> {
  using Base = CpuCommon<V, S>;
  using Base::columns;
  using Base::load;
  using Base::scratch_of;
  using Base::store;
  using Base::W;
  using typename Base::Acc;
  using typename Base::G;

  static int64_t count(const Selection& s) { return s.token_begin[s.tokens]; }
  static double flops_of(const Selection& s, int64_t width) { return 2.0 * static_cast<double>(count(s) * width); }

  // out[t, i] = <x_t, matrix row i> for selected ranks; other elements are left alone.
  static void shrink(const SelectedShrinkArgs& a, const Exec&) {
    const Selection& s = *a.selection;
    const auto body = [&](int64_t task, int) {
      const int64_t t1 = smaller((task + 1) * kSelectedTokens, s.tokens);
      const S* m[kSelectedRanks];
      Acc sums[kSelectedRanks];
      for (int64_t t = task * kSelectedTokens; t < t1; ++t)
        for (int64_t first = s.token_begin[t]; first < s.token_begin[t + 1]; first += kSelectedRanks) {
          const int64_t n = smaller(kSelectedRanks, s.token_begin[t + 1] - first);
          for (int64_t c = 0; c < a.width; c += kChunk) {
            const S* x = static_cast<const S*>(a.x.data) + t * a.x.ld + c;
            for (int64_t i = 0; i < n; ++i) m[i] = static_cast<const S*>(a.matrix) + s.ranks[first + i] * a.width + c;
            G::dot_rows(&x, 1, m, n, smaller(kChunk, a.width - c), sums, n, c > 0, nullptr, 0);
          }
          for (int64_t i = 0; i < n; ++i) static_cast<Acc*>(a.out)[t * s.ld + s.ranks[first + i]] = sums[i];
        }
    };
    for_each_task(ceil_div(s.tokens, kSelectedTokens), flops_of(s, a.width), body);
  }

  // y_t = y0_t + sum over selected ranks of values[t, i] * matrix row i.
  static void expand(const SelectedExpandArgs& a, const Exec&) {
    const Selection& s = *a.selection;
    const int64_t strips = ceil_div(a.width, kSelectedStrip);
    const auto body = [&](int64_t task, int) {
      const int64_t t0 = task / strips * kSelectedTokens, t1 = smaller(t0 + kSelectedTokens, s.tokens);
      const int64_t c0 = task % strips * kSelectedStrip, width = smaller(kSelectedStrip, a.width - c0);
      for (int64_t t = t0; t < t1; ++t) expand_row(a, t, c0, width);
    };
    for_each_task(ceil_div(s.tokens, kSelectedTokens) * strips, flops_of(s, a.width), body);
  }

  static void expand_row(const SelectedExpandArgs& a, int64_t t, int64_t c0, int64_t width) {
    constexpr int kVecs = 8;
    const Selection& s = *a.selection;
    const Acc* values = static_cast<const Acc*>(a.values) + t * s.ld;
    const S* matrix = static_cast<const S*>(a.matrix) + c0;
    const S* y0 = a.y0.data == nullptr ? nullptr : static_cast<const S*>(a.y0.data) + t * a.y0.ld + c0;
    S* y = static_cast<S*>(a.y.data) + t * a.y.ld + c0;
    const int64_t begin = s.token_begin[t], end = s.token_begin[t + 1];
    int64_t c = 0;
    for (; c + kVecs * W <= width; c += kVecs * W) {
      typename V::Reg sum[kVecs];
      MORAINE_UNROLL
      for (int v = 0; v < kVecs; ++v) sum[v] = V::zero();
      for (int64_t i = begin; i < end; ++i) {
        const auto value = V::set1(values[s.ranks[i]]);
        const S* row = matrix + s.ranks[i] * a.width + c;
        MORAINE_UNROLL
        for (int v = 0; v < kVecs; ++v) sum[v] = V::fma(value, V::load(row + v * W), sum[v]);
      }
      MORAINE_UNROLL
      for (int v = 0; v < kVecs; ++v)
        V::store(y + c + v * W, y0 == nullptr ? sum[v] : V::add(V::load(y0 + c + v * W), sum[v]));
    }
    columns(width - c, [&](int64_t at, int n) {
      auto sum = V::zero();
      for (int64_t i = begin; i < end; ++i)
        sum = V::fma(V::set1(values[s.ranks[i]]), load(matrix + s.ranks[i] * a.width + c + at, n), sum);
      store(y + c + at, y0 == nullptr ? sum : V::add(load(y0 + c + at, n), sum), n);
    });
  }

  // out[i, :] (+)= sum over the tokens that select rank i of values[t, i] * x_t.
  static void outer(const SelectedOuterArgs& a, void* scratch, const Exec&) {
    const Selection& s = *a.selection;
    const int64_t strips = ceil_div(a.width, kOuterStrip);
    const auto body = [&](int64_t task, int thread) {  // ranks innermost: the strip of x stays in the L2 cache
      const int64_t rank = task % s.rank, c0 = task / s.rank * kOuterStrip, width = smaller(kOuterStrip, a.width - c0);
      Acc* out = static_cast<Acc*>(a.out) + rank * a.width + c0;
      const int64_t begin = s.rank_begin[rank], n = s.rank_begin[rank + 1] - begin;
      constexpr int64_t kValues = kPanelBytes / sizeof(Acc);
      Acc* values = reinterpret_cast<Acc*>(scratch_of(scratch, thread).panel);
      const auto c_row = [&](int64_t) { return out; };
      if (n == 0)
        G::multiply_rows(
            1, width, 0, c_row, 1, [](int64_t) { return static_cast<const S*>(nullptr); }, c_row, a.accumulate,
            nullptr);
      for (int64_t first = 0; first < n; first += kValues) {
        const int32_t* token = s.tokens_of + begin + first;
        const int64_t here = smaller(kValues, n - first);
        for (int64_t i = 0; i < here; ++i) values[i] = static_cast<const Acc*>(a.values)[token[i] * s.ld + rank];
        const auto x_row = [&](int64_t i) { return static_cast<const S*>(a.x.data) + token[i] * a.x.ld + c0; };
        G::multiply_rows(
            1, width, here, [&](int64_t) { return values; }, 1, x_row, c_row, a.accumulate || first > 0, nullptr);
      }
    };
    for_each_task(s.rank * strips, flops_of(s, a.width), body);
  }

  static const SelectedPrimitives& table() {
    static const SelectedPrimitives primitives{shrink, expand, outer};
    return primitives;
  }
};

}  // namespace
}  // namespace moraine::kernels
