#pragma once

#include "kernels/backend.h"
#include "kernels/cpu_gemm.h"
#include "kernels/tasks.h"

/// What the CPU primitives share: sizes of tasks, scratch memory, vectors over rows, one expert's product for a block
/// of tokens.
namespace moraine::kernels {
namespace {

constexpr int64_t kTokenBlock = 96;       // rows of a shrink task
constexpr int64_t kRankBlock = 128;       // ranks of a shrink task
constexpr int64_t kPairBlock = 2048;      // pairs of an expand task: weights come from memory once for so many
constexpr int64_t kOuterStrip = 256;      // columns of an outer task
constexpr int64_t kHiddenStrip = 128;     // columns of a hidden task; fixes the order of <h, q>
constexpr size_t kBufferBytes = 1 << 20;  // pair rows of one expand task; those of one expert should fit the L2 cache

struct ThreadScratch {
  alignas(64) char panel[kPanelBytes];
  alignas(64) char buffer[2][kBufferBytes];  // pair rows; a shrink keeps its packed token rows there
  alignas(64) unsigned char live[2][kBufferBytes / 64];
};

/// Tokens of one expand task of at most so many pairs (kPairBlock rows of 64 columns of double just fit the buffer).
inline int64_t token_block(int64_t pairs, int64_t tokens, int64_t slots) {
  return smaller(pairs / slots > 0 ? pairs / slots : 1, tokens);
}

template <class V, class S>
struct CpuCommon {
  using G = Gemm<V, S>;
  using Acc = typename G::Acc;
  static constexpr int W = V::kWidth;

  static ThreadScratch& scratch_of(void* scratch, int thread) { return static_cast<ThreadScratch*>(scratch)[thread]; }

  static int64_t rank_of(const Segments& segments, int64_t e) {
    return segments.row_offsets[e + 1] - segments.row_offsets[e];
  }
  static double flops_of(const Route& route, const Segments& segments, int64_t width) {
    double sum = 0;
    for (int64_t e = 0; e < route.experts; ++e)
      sum += static_cast<double>(route.offsets[e + 1] - route.offsets[e]) * static_cast<double>(rank_of(segments, e));
    return 2 * sum * static_cast<double>(width);
  }

  static const S* row(const PairRows& x, const Route& route, int64_t s) {
    return static_cast<const S*>(x.data) + route.perm[s] / x.divisor * x.ld;
  }

  // The first of sorted positions [from, to), all of one expert, whose pair is not before `pair`.
  static int64_t first_pair(const Route& route, int64_t from, int64_t to, int64_t pair) {
    while (from < to) {
      const int64_t middle = (from + to) / 2;
      if (route.perm[middle] < pair) {
        from = middle + 1;
      } else {
        to = middle;
      }
    }
    return from;
  }

  // Adds one term for tokens [t0, t1) and columns [c0, c0 + width) to pair rows `buffer` (row p - t0 k, `width` apart)
  // and marks them live. Only live rows hold anything.
  static void expand_block(const ExpandTerm& term, const Route& route, int64_t matrix_width, int64_t t0, int64_t t1,
                           int64_t c0, int64_t width, Acc* buffer, unsigned char* live, void* panel) {
    for (int64_t e = 0; e < route.experts; ++e) {
      const int64_t rank = rank_of(term.segments, e), ld = padded_rank(rank);
      if (rank == 0) continue;
      const int64_t s0 = first_pair(route, route.offsets[e], route.offsets[e + 1], t0 * route.slots);
      const int64_t s1 = first_pair(route, s0, route.offsets[e + 1], t1 * route.slots);
      if (s0 == s1) continue;
      const auto local = [&](int64_t m) { return route.perm[s0 + m] - t0 * route.slots; };
      const bool add = live[local(0)] != 0;  // a row is live by its expert, so all of these are or none
      const Acc* pairs =
          static_cast<const Acc*>(term.pairs) + term.segments.pair_offsets[e] + (s0 - route.offsets[e]) * ld;
      const auto c_row = [&](int64_t m) { return buffer + local(m) * width; };
      if (term.matrix == nullptr) {
        for (int64_t m = 0; m < s1 - s0; ++m)
          for (int64_t c = 0; c < width; ++c) c_row(m)[c] = pairs[m * ld + c0 + c] + (add ? c_row(m)[c] : Acc(0));
      } else {
        const S* matrix = static_cast<const S*>(term.matrix) + term.segments.row_offsets[e] * matrix_width + c0;
        const auto q_row = [&](int64_t k) { return matrix + k * matrix_width; };
        G::multiply_rows(
            s1 - s0, width, rank, [&](int64_t m) { return pairs + m * ld; }, 1, q_row, c_row, add, panel);
      }
      for (int64_t m = 0; m < s1 - s0; ++m) live[local(m)] = 1;
    }
  }

  // body(register load and store helpers): runs over columns [0, width) in vectors, the last one partial.
  template <class Body>
  [[gnu::always_inline]] static void columns(int64_t width, Body&& body) {
    int64_t c = 0;
    for (; c + W <= width; c += W) body(c, W);
    if (c < width) body(c, static_cast<int>(width - c));
  }
  template <class T>
  [[gnu::always_inline]] static typename V::Reg load(const T* p, int n) {
    return n == W ? V::load(p) : V::load_n(p, n);
  }
  template <class T>
  [[gnu::always_inline]] static void store(T* p, typename V::Reg x, int n) {
    if (n == W) {
      V::store(p, x);
    } else {
      V::store_n(p, x, n);
    }
  }
};

}  // namespace
}  // namespace moraine::kernels
