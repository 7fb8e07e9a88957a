#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/cpu_storage.h"

/// The two products every CPU primitive is made of, as templates over a vector type V (cpu_vec_*.h) and a storage type
/// S.
///
/// Both keep, for each output element, one order of operations that no blocking, tile shape or thread count changes:
/// dot_rows sums lane l over columns l, l + W, .. of a chunk of kChunk columns, adds the lanes by a fixed tree and the
/// chunks in order; multiply_rows is one chain over k. Internal linkage throughout, for the reason given in
/// cpu_vec_x86.h.

// Tiles must live in registers; left to itself GCC keeps some of them in memory.
#define MORAINE_UNROLL _Pragma("GCC unroll 16")

namespace moraine::kernels {
namespace {

constexpr int64_t kChunk = 1024;      // columns per partial dot product
constexpr int64_t kPanelDepth = 256;  // k rows packed at once
constexpr int64_t kDirectDepth =
    32;  // k rows of a product that is not packed: rows a power of two apart share cache sets
constexpr int64_t kPanelWidth = 128;  // columns packed at once
constexpr int64_t kStayRanks = 64;    // a chunk of so many weight rows stays in the L2 cache while token rows pass
constexpr size_t kPanelBytes = kPanelDepth * kPanelWidth * sizeof(double);

/// Asks for the memory from `p` on, a line each 64 bytes, while something else is computed. Any address will do.
template <int Bytes>
[[gnu::always_inline]] inline void fetch_ahead(const void* p) {
  for (int i = 0; i < Bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i, 0, 2);
}

template <class T>
[[gnu::always_inline]] inline T smaller(T a, T b) {
  return a < b ? a : b;
}

/// Calls body(std::integral_constant<int, n>) for n in [1, Max].
template <int Max, class Body>
[[gnu::always_inline]] inline void with_size(int n, Body&& body) {
  if constexpr (Max == 1) {
    body(std::integral_constant<int, 1>{});
  } else if (n == Max) {
    body(std::integral_constant<int, Max>{});
  } else {
    with_size<Max - 1>(n, body);
  }
}

template <class V, class S>
struct Gemm {
  using Acc = typename V::Scalar;
  using Reg = typename V::Reg;
  static constexpr int W = V::kWidth;

  // out[m, n] (+)= <x[m], a[n]> over `len` columns; `soon`: two rows that will be read soon.
  template <int M, int N>
  [[gnu::noinline]] static void dot_tile(const S* const* x, const S* const* a, int64_t len, Acc* out, int64_t ldo,
                                         bool accumulate, const S* const* soon) {
    Reg acc[M][N];
    const S* xr[M];
    const S* ar[N];
    MORAINE_UNROLL
    for (int m = 0; m < M; ++m) xr[m] = x[m];
    MORAINE_UNROLL
    for (int n = 0; n < N; ++n) ar[n] = a[n];
    MORAINE_UNROLL
    for (int m = 0; m < M; ++m) MORAINE_UNROLL
    for (int n = 0; n < N; ++n) acc[m][n] = V::zero();
    int64_t c = 0;
    if constexpr (requires { V::dot_pairs(xr[0], ar[0], acc[0][0]); }) {
      for (; c + V::kPairWidth <= len; c += V::kPairWidth) {
        fetch_ahead<V::kPairWidth * sizeof(S)>(soon[0] + c);
        fetch_ahead<V::kPairWidth * sizeof(S)>(soon[1] + c);
        MORAINE_UNROLL
        for (int n = 0; n < N; ++n) MORAINE_UNROLL
        for (int m = 0; m < M; ++m) acc[m][n] = V::dot_pairs(xr[m] + c, ar[n] + c, acc[m][n]);
      }
    }
    const auto step = [&](int64_t at) __attribute__((always_inline)) {
      Reg xv[M];
      MORAINE_UNROLL
      for (int m = 0; m < M; ++m) xv[m] = V::load(xr[m] + at);
      MORAINE_UNROLL
      for (int n = 0; n < N; ++n) {
        const Reg av = V::load(ar[n] + at);
        MORAINE_UNROLL
        for (int m = 0; m < M; ++m) acc[m][n] = V::fma(xv[m], av, acc[m][n]);
      }
    };
    for (; c + 2 * W <= len; c += 2 * W) {
      fetch_ahead<2 * W * sizeof(S)>(soon[0] + c);
      fetch_ahead<2 * W * sizeof(S)>(soon[1] + c);
      step(c);
      step(c + W);
    }
    for (; c + W <= len; c += W) step(c);
    if (c < len) {
      const int tail = static_cast<int>(len - c);
      MORAINE_UNROLL
      for (int n = 0; n < N; ++n) {
        const Reg av = V::load_n(ar[n] + c, tail);
        MORAINE_UNROLL
        for (int m = 0; m < M; ++m) acc[m][n] = V::fma(V::load_n(xr[m] + c, tail), av, acc[m][n]);
      }
    }
    MORAINE_UNROLL
    for (int m = 0; m < M; ++m) {
      Acc sums[N];
      if constexpr (N % 4 == 0) {  // the same tree as sum, four at a time
        MORAINE_UNROLL
        for (int n = 0; n < N; n += 4) V::sum4(acc[m][n], acc[m][n + 1], acc[m][n + 2], acc[m][n + 3], sums + n);
      } else {
        MORAINE_UNROLL
        for (int n = 0; n < N; ++n) sums[n] = V::sum(acc[m][n]);
      }
      Acc* o = out + m * ldo;
      MORAINE_UNROLL
      for (int n = 0; n < N; ++n) o[n] = accumulate ? o[n] + sums[n] : sums[n];
    }
  }

  // The same for any number of rows; x and a are arrays of row pointers. Few weight rows stay in the cache while the
  // token rows pass; of many, a tile stays. soon: rows of the next call, asked for meanwhile.
  static void dot_rows(const S* const* x, int64_t rows, const S* const* a, int64_t ranks, int64_t len, Acc* out,
                       int64_t ldo, bool accumulate, const S* const* soon, int64_t num_soon) {
    const S* two[2];
    if (rows == 1) {
      for (int64_t n = 0; n < ranks; n += 8) {
        two[0] = two[1] = a[n];
        with_size<8>(static_cast<int>(smaller<int64_t>(8, ranks - n)),
                     [&](auto N) { dot_tile<1, N>(x, a + n, len, out + n, ldo, accumulate, two); });
      }
      return;
    }
    const bool weights_stay = ranks <= kStayRanks;
    const int64_t step = V::kDotRows[smaller<int64_t>(4, ranks)];
    for (int64_t m0 = 0; m0 < rows; m0 += weights_stay ? step : rows) {
      const int64_t m1 = weights_stay ? smaller(m0 + step, rows) : rows;
      for (int64_t n = 0; n < ranks; n += 4)
        with_size<4>(static_cast<int>(smaller<int64_t>(4, ranks - n)), [&](auto N) {
          constexpr int kStep = V::kDotRows[N];
          if (!weights_stay) {
            soon = a + smaller(n + 4, ranks);
            num_soon = smaller(n + 8, ranks) - smaller(n + 4, ranks);
          }
          for (int64_t m = m0; m < m1; m += smaller<int64_t>(step, kStep)) {
            for (const S*& row : two) row = num_soon > 0 ? (--num_soon, *soon++) : x[m];
            with_size<kStep>(static_cast<int>(smaller<int64_t>(smaller<int64_t>(step, kStep), m1 - m)), [&](auto M) {
              dot_tile<M, N>(x + m, a + n, len, out + m * ldo + n, ldo, accumulate, two);
            });
          }
        });
    }
  }

  // Rows of the next tile of so many left: as few tiles as possible, about equal, for a tile of few rows waits for its
  // own sums.
  static int tile_rows(int64_t left) {
    const int64_t tiles = (left + V::kTileRows - 1) / V::kTileRows;
    return static_cast<int>((left + tiles - 1) / tiles);
  }

  // Left factor of a product: element (m, k) at row(m)[k * step].
  //
  // A tile computes acc[m][v] = begin(m, v) + sum_k left(m, k) q(k)[v W ..] and hands finish(m, v, acc) to put(m, v,
  // ..). q(k) is where row k starts for this tile; ahead(k) is called once per k, for asking for memory. Tail: one
  // vector of which `tail` columns exist.
  template <int M, int NV, bool Tail, class RowOf, class Ahead, class Begin, class Finish, class Put>
  [[gnu::always_inline]] static void tile(const Acc* const* left, int64_t step, int64_t depth, RowOf q, Ahead ahead,
                                          int tail, Begin begin, Finish finish, Put put) {
    Reg acc[M][NV];
    MORAINE_UNROLL
    for (int m = 0; m < M; ++m) MORAINE_UNROLL
    for (int v = 0; v < NV; ++v) acc[m][v] = begin(m, v);
    const Acc* p[M];
    MORAINE_UNROLL
    for (int m = 0; m < M; ++m) p[m] = left[m];
    for (int64_t k = 0; k < depth; ++k) {
      const auto* row = q(k);
      ahead(k);
      Reg b[NV];
      MORAINE_UNROLL
      for (int v = 0; v < NV; ++v) b[v] = Tail ? V::load_n(row, tail) : V::load(row + v * W);
      MORAINE_UNROLL
      for (int m = 0; m < M; ++m) {
        const Reg s = V::set1(p[m][k * step]);
        MORAINE_UNROLL
        for (int v = 0; v < NV; ++v) acc[m][v] = V::fma(s, b[v], acc[m][v]);
      }
    }
    // All that is read before anything is written: rows a multiple of 4 KB apart look alike to a store buffer.
    MORAINE_UNROLL
    for (int m = 0; m < M; ++m) MORAINE_UNROLL
    for (int v = 0; v < NV; ++v) acc[m][v] = finish(m, v, acc[m][v]);
    MORAINE_UNROLL
    for (int m = 0; m < M; ++m) MORAINE_UNROLL
    for (int v = 0; v < NV; ++v) put(m, v, acc[m][v]);
  }

  // Where a tile's sums start and go. Sum: c[m] (+)= the product.
  struct Sum {
    Acc* const* c;
    bool accumulate;
    template <bool Tail>
    [[gnu::always_inline]] Reg begin(int m, int64_t column, int tail) const {
      return !accumulate ? V::zero() : Tail ? V::load_n(c[m] + column, tail) : V::load(c[m] + column);
    }
    template <bool>
    [[gnu::always_inline]] Reg finish(int, int64_t, Reg x, int) const {
      return x;
    }
    [[gnu::always_inline]] void ahead(int, int64_t) const {}
  };
  // Weighted: c[m] = base[m] + weight[m] times the product, without a base from 0. next_base, next_c (may be null):
  // rows that will be read and written soon.
  struct Weighted {
    Acc* const* c;
    const Acc* const* base;
    const Acc* weight;
    const Acc* const* next_base;
    const Acc* const* next_c;
    template <bool>
    [[gnu::always_inline]] Reg begin(int, int64_t, int) const {
      return V::zero();
    }
    template <bool Tail>
    [[gnu::always_inline]] Reg finish(int m, int64_t column, Reg x, int tail) const {
      const Reg from = base[m] == nullptr ? V::zero()
                       : Tail             ? V::load_n(base[m] + column, tail)
                                          : V::load(base[m] + column);
      return V::fma(V::set1(weight[m]), x, from);
    }
    [[gnu::always_inline]] void ahead(int m, int64_t column) const {
      if (next_base[m] != nullptr) fetch_ahead<V::kTileVecs * W * sizeof(Acc)>(next_base[m] + column);
      if (next_c[m] != nullptr) __builtin_prefetch(next_c[m] + column, 1, 2);
    }
  };

  // Columns [column, column + NV W) of M rows of `out`, or of one vector's first `tail`.
  template <int M, int NV, bool Tail, class RowOf, class Ahead, class Out>
  [[gnu::always_inline]] static void tile_to(const Acc* const* left, int64_t step, int64_t depth, RowOf q, Ahead ahead,
                                             const Out& out, int64_t column, int tail) {
    tile<M, NV, Tail>(
        left, step, depth, q, ahead, tail,
        [&](int m, int v) __attribute__((always_inline)) { return out.template begin<Tail>(m, column + v * W, tail); },
        [&](int m, int v, Reg x)
            __attribute__((always_inline)) { return out.template finish<Tail>(m, column + v * W, x, tail); },
        [&](int m, int v, Reg x) __attribute__((always_inline)) {
          Acc* to = out.c[m] + column + v * W;
          if constexpr (Tail) {
            V::store_n(to, x, tail);
          } else {
            V::store(to, x);
          }
        });
  }

  // At most kTileRows rows straight from the weight rows: each weight is read once, nothing is packed.
  template <int M, class Out>
  [[gnu::noinline]] static void direct(const Acc* const* left, int64_t step, int64_t depth, const S* const* q,
                                       const Out& out, int64_t width) {
    constexpr int NV = V::kDirectVecs[M];
    int64_t column = 0;
    const auto from = [&](int64_t k) { return q[k] + column; };
    const auto ahead = [&](int64_t k) { fetch_ahead<NV * W * sizeof(S)>(q[k] + column + NV * W); };
    const auto nothing = [](int64_t) {};
    for (; column + NV * W <= width; column += NV * W)
      tile_to<M, NV, false>(left, step, depth, from, ahead, out, column, 0);
    for (; column + W <= width; column += W) tile_to<M, 1, false>(left, step, depth, from, nothing, out, column, 0);
    if (column < width)
      tile_to<M, 1, true>(left, step, depth, from, nothing, out, column, static_cast<int>(width - column));
  }

  // Rows q[k][first .. first + width) as panels [ceil(width / PW)][depth][PW], widened, zero-filled on the right.
  [[gnu::noinline]] static void pack(const S* const* q, int64_t depth, int64_t first, int64_t width, Acc* panels) {
    constexpr int PW = V::kTileVecs * W;
    constexpr int64_t kAhead = 4;  // rows
    for (int64_t k = 0; k < depth; ++k) {
      const S* from = q[k] + first;
      const S* next = q[k + kAhead < depth ? k + kAhead : k] + first;
      Acc* to = panels + k * PW;
      for (int64_t column = 0; column < width; column += PW, to += depth * PW) {
        fetch_ahead<PW * sizeof(S)>(next + column);
        MORAINE_UNROLL
        for (int v = 0; v < V::kTileVecs; ++v) {
          const int64_t left = width - column - v * W;
          const Reg x = left >= W  ? V::load(from + column + v * W)
                        : left > 0 ? V::load_n(from + column + v * W, static_cast<int>(left))
                                   : V::zero();
          V::store(to + v * W, x);
        }
      }
    }
  }

  // From panels; `next` (may be null): rows of weights that will be packed next, asked for meanwhile.
  template <int M, class Out>
  [[gnu::noinline]] static void packed(const Acc* const* left, int64_t step, int64_t depth, const Acc* panels,
                                       const S* const* next, const Out& out, int64_t width) {
    constexpr int PW = V::kTileVecs * W;
    for (int64_t column = 0; column < width; column += PW, panels += depth * PW) {
      const int64_t here = width - column;
      const auto from = [&](int64_t k) { return panels + k * PW; };
      const auto nothing = [](int64_t) {};
      if (here >= PW) {
        MORAINE_UNROLL
        for (int m = 0; m < M; ++m) out.ahead(m, column);
        if (next != nullptr) {
          tile_to<M, V::kTileVecs, false>(
              left, step, depth, from, [&](int64_t k) { fetch_ahead<PW * sizeof(S)>(next[k] + column); }, out, column,
              0);
        } else {
          tile_to<M, V::kTileVecs, false>(left, step, depth, from, nothing, out, column, 0);
        }
        continue;
      }
      for (int64_t v = 0; v * W < here; ++v) {
        const auto narrow_from = [&](int64_t k) { return panels + k * PW + v * W; };
        const int tail = static_cast<int>(smaller<int64_t>(W, here - v * W));
        if (tail == W) {
          tile_to<M, 1, false>(left, step, depth, narrow_from, nothing, out, column + v * W, 0);
        } else {
          tile_to<M, 1, true>(left, step, depth, narrow_from, nothing, out, column + v * W, tail);
        }
      }
    }
  }

  // c(m)[0 .. width) (+)= sum_k left(m)[k step] q(k)[0 .. width). With a step other than 1, rows of the left factor lie
  // side by side: left(m + i) is left(m) + i. scratch: kPanelBytes. depth 0 writes zeros unless accumulating.
  template <class LeftRow, class QRow, class CRow>
  static void multiply_rows(int64_t rows, int64_t width, int64_t depth, LeftRow left_row, int64_t step, QRow q_row,
                            CRow c_row, bool accumulate, void* scratch) {
    if (depth == 0 && !accumulate)
      for (int64_t m = 0; m < rows; ++m) std::memset(c_row(m), 0, static_cast<size_t>(width) * sizeof(Acc));
    constexpr int kRows = V::kTileRows;
    const bool packs = rows > kRows;
    const int64_t block = packs ? kPanelDepth : kDirectDepth, strip = packs ? kPanelWidth : width;
    const S *q[kPanelDepth], *next[kPanelDepth];
    alignas(64) Acc gathered[kPanelDepth * kRows];
    const Acc* left[kRows];
    Acc* c[kRows];
    for (int64_t k = 0; k < depth; k += block) {
      const int64_t here = smaller(block, depth - k);
      for (int64_t i = 0; i < here; ++i) q[i] = q_row(k + i);
      for (int64_t first = 0; first < width; first += strip) {
        const int64_t columns = smaller(strip, width - first);
        const bool more = first + strip < width || k + block < depth;
        if (packs) {
          pack(q, here, first, columns, static_cast<Acc*>(scratch));
          for (int64_t i = 0; more && i < here; ++i)
            next[i] = first + strip < width ? q[i] + first + strip : q_row(smaller(k + block + i, depth - 1));
        }
        int count = 0;
        for (int64_t m = 0; m < rows; m += count) {
          count = tile_rows(rows - m);
          for (int i = 0; i < count; ++i) {
            left[i] = left_row(m + i) + k * step;
            c[i] = c_row(m + i) + first;
          }
          const Sum out{c, accumulate || k > 0};
          with_size<kRows>(count, [&](auto M) {
            if (!packs) return direct<M>(left, step, here, q, out, columns);
            if (step != 1) {  // a power of two apart, elements would share cache sets
              for (int64_t i = 0; i < here; ++i) std::memcpy(gathered + i * M, left[0] + i * step, M * sizeof(Acc));
              for (int i = 0; i < M; ++i) left[i] = gathered + i;
            }
            packed<M>(left, step == 1 ? 1 : M, here, static_cast<const Acc*>(scratch), more && m == 0 ? next : nullptr,
                      out, columns);
          });
        }
      }
    }
  }

  // Elements of panels that hold `depth` rows of `width` columns.
  static constexpr int64_t panel_size(int64_t depth, int64_t width) {
    constexpr int64_t PW = V::kTileVecs * W;
    return (width + PW - 1) / PW * PW * depth;
  }

  // A row of add_product: of the left factor, where its sum starts (null: 0) and goes, its weight.
  struct AddRow {
    const Acc* left;
    const Acc* base;
    Acc* c;
    Acc weight;
    const Acc* next_base;  // asked for meanwhile; with next_c
    const Acc* next_c;
  };

  // c_m = base_m + weight_m sum_k left_m[k] q(k) over columns [0, width), with row_of(m) an AddRow. panels: as pack
  // makes them; not filled yet, they are on the way (fill), or null: straight from the weight rows, for few rows.
  template <class RowOf>
  static void add_product(RowOf row_of, int64_t rows, int64_t width, int64_t depth, const S* const* q, Acc* panels,
                          bool fill) {
    constexpr int kRows = V::kTileRows;
    const Acc *left[kRows], *base[kRows], *next_base[kRows], *next_c[kRows];
    Acc* c[kRows];
    Acc weight[kRows];
    int count = 0;
    for (int64_t m = 0; m < rows; m += count) {
      count = tile_rows(rows - m);
      for (int i = 0; i < count; ++i) {
        const AddRow from = row_of(m + i);
        left[i] = from.left, base[i] = from.base, c[i] = from.c, weight[i] = from.weight;
        next_base[i] = from.next_base, next_c[i] = from.next_c;
      }
      const Weighted out{c, base, weight, next_base, next_c};
      with_size<kRows>(count, [&](auto M) {
        if (panels == nullptr) {
          direct<M>(left, 1, depth, q, out, width);
        } else if (fill && m == 0) {
          filling<M>(left, depth, q, panels, out, width);
        } else {
          packed<M>(left, 1, depth, panels, nullptr, out, width);
        }
      });
    }
  }

  // As direct, and packs the weights it reads.
  template <int M, class Out>
  [[gnu::noinline]] static void filling(const Acc* const* left, int64_t depth, const S* const* q, Acc* panels,
                                        const Out& out, int64_t width) {
    constexpr int PW = V::kTileVecs * W;
    int64_t column = 0;
    for (; column + PW <= width; column += PW, panels += depth * PW) {
      const auto from = [&](int64_t k) { return q[k] + column; };
      const auto keep = [&](int64_t k) {
        fetch_ahead<PW * sizeof(S)>(q[k] + column + PW);
        MORAINE_UNROLL
        for (int v = 0; v < V::kTileVecs; ++v) V::store(panels + k * PW + v * W, V::load(q[k] + column + v * W));
      };
      tile_to<M, V::kTileVecs, false>(left, 1, depth, from, keep, out, column, 0);
    }
    if (column == width) return;
    pack(q, depth, column, width - column, panels);
    const auto rest = [&](int64_t k) { return q[k] + column; };
    const auto nothing = [](int64_t) {};
    for (; column + W <= width; column += W) tile_to<M, 1, false>(left, 1, depth, rest, nothing, out, column, 0);
    if (column < width)
      tile_to<M, 1, true>(left, 1, depth, rest, nothing, out, column, static_cast<int>(width - column));
  }
};

}  // namespace
}  // namespace moraine::kernels
