#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/cpu_storage.h"

/// The two products every CPU primitive is made of, as templates over a vector type V (cpu_vec_*.h) and a storage type S.
///
/// Both keep, for each output element, one order of operations that no blocking, tile shape or thread count changes:
/// dot_rows sums lane l over columns l, l + W, .. of a chunk of kChunk columns, adds the lanes by a fixed tree and the chunks in
/// order; multiply_rows is one chain over k. Internal linkage throughout, for the reason given in cpu_vec_x86.h.

// Tiles must live in registers; left to itself GCC keeps some of them in memory.
#define MORAINE_UNROLL _Pragma("GCC unroll 16")

namespace moraine::kernels {
namespace {

constexpr int64_t kChunk = 1024;       // columns per partial dot product
constexpr int64_t kPanelDepth = 64;    // k rows packed at once
constexpr int64_t kPanelWidth = 256;   // columns packed at once
constexpr size_t kPanelBytes = kPanelDepth * kPanelWidth * sizeof(double);

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

  // out[m, n] (+)= <x[m], a[n]> over `len` columns.
  template <int M, int N>
  [[gnu::noinline]] static void dot_tile(const S* const* x, const S* const* a, int64_t len, Acc* out, int64_t ldo, bool accumulate) {
    Reg acc[M][N];
    const S* xr[M];
    const S* ar[N];
    MORAINE_UNROLL
    for (int m = 0; m < M; ++m) xr[m] = x[m];
    MORAINE_UNROLL
    for (int n = 0; n < N; ++n) ar[n] = a[n];
    MORAINE_UNROLL
    for (int m = 0; m < M; ++m)
      MORAINE_UNROLL
      for (int n = 0; n < N; ++n) acc[m][n] = V::zero();
    int64_t c = 0;
    if constexpr (requires { V::dot_pairs(xr[0], ar[0], acc[0][0]); }) {
      for (; c + V::kPairWidth <= len; c += V::kPairWidth)
        MORAINE_UNROLL
        for (int n = 0; n < N; ++n)
          MORAINE_UNROLL
          for (int m = 0; m < M; ++m) acc[m][n] = V::dot_pairs(xr[m] + c, ar[n] + c, acc[m][n]);
    }
    for (; c + W <= len; c += W) {
      Reg xv[M];
      MORAINE_UNROLL
      for (int m = 0; m < M; ++m) xv[m] = V::load(xr[m] + c);
      MORAINE_UNROLL
      for (int n = 0; n < N; ++n) {
        const Reg av = V::load(ar[n] + c);
        MORAINE_UNROLL
        for (int m = 0; m < M; ++m) acc[m][n] = V::fma(xv[m], av, acc[m][n]);
      }
    }
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

  // The same for any number of rows; x and a are arrays of row pointers.
  static void dot_rows(const S* const* x, int64_t rows, const S* const* a, int64_t ranks, int64_t len, Acc* out, int64_t ldo,
                       bool accumulate) {
    if (rows == 1) {
      for (int64_t n = 0; n < ranks; n += 8)
        with_size<8>(static_cast<int>(smaller<int64_t>(8, ranks - n)),
                     [&](auto N) { dot_tile<1, N>(x, a + n, len, out + n, ldo, accumulate); });
      return;
    }
    for (int64_t n = 0; n < ranks; n += 4) {
      with_size<4>(static_cast<int>(smaller<int64_t>(4, ranks - n)), [&](auto N) {
        constexpr int kStep = V::kDotRows[N];
        for (int64_t m = 0; m < rows; m += kStep)
          with_size<kStep>(static_cast<int>(smaller<int64_t>(kStep, rows - m)),
                           [&](auto M) { dot_tile<M, N>(x + m, a + n, len, out + m * ldo + n, ldo, accumulate); });
      });
    }
  }

  // Left factor of multiply_rows: element (m, k) at p[m * step_m + k * step_k].
  struct Left {
    const Acc* p;
    int64_t step_m, step_k;
  };

  // c[m][0 .. NV W) (+)= sum_k left(m, k) q(k)[0 .. NV W); Tail: one vector of which only `tail` columns exist.
  template <int M, int NV, bool Tail, class RowOf>
  [[gnu::always_inline]] static void tile(Left left, int64_t depth, RowOf q, Acc* const* c, int64_t column, bool accumulate,
                                          int tail) {
    Reg acc[M][NV];
    MORAINE_UNROLL
    for (int m = 0; m < M; ++m)
      MORAINE_UNROLL
      for (int v = 0; v < NV; ++v) {
        const Acc* at = c[m] + column + v * W;
        acc[m][v] = !accumulate ? V::zero() : Tail ? V::load_n(at, tail) : V::load(at);
      }
    const Acc* p[M];
    MORAINE_UNROLL
    for (int m = 0; m < M; ++m) p[m] = left.p + m * left.step_m;
    for (int64_t k = 0; k < depth; ++k) {
      const auto* row = q(k);
      Reg b[NV];
      MORAINE_UNROLL
      for (int v = 0; v < NV; ++v) b[v] = Tail ? V::load_n(row, tail) : V::load(row + v * W);
      MORAINE_UNROLL
      for (int m = 0; m < M; ++m) {
        const Reg s = V::set1(p[m][k * left.step_k]);
        MORAINE_UNROLL
        for (int v = 0; v < NV; ++v) acc[m][v] = V::fma(s, b[v], acc[m][v]);
      }
    }
    MORAINE_UNROLL
    for (int m = 0; m < M; ++m)
      MORAINE_UNROLL
      for (int v = 0; v < NV; ++v) {
        Acc* at = c[m] + column + v * W;
        if constexpr (Tail) {
          V::store_n(at, acc[m][v], tail);
        } else {
          V::store(at, acc[m][v]);
        }
      }
  }

  // At most kTileRows rows straight from the weight rows: each weight is read once, nothing is packed.
  template <int M>
  [[gnu::noinline]] static void direct(Left left, int64_t depth, const S* const* q, Acc* const* c, int64_t width, bool accumulate) {
    constexpr int NV = V::kDirectVecs[M];
    int64_t column = 0;
    const auto from = [&](int64_t k) { return q[k] + column; };
    for (; column + NV * W <= width; column += NV * W) tile<M, NV, false>(left, depth, from, c, column, accumulate, 0);
    for (; column + W <= width; column += W) tile<M, 1, false>(left, depth, from, c, column, accumulate, 0);
    if (column < width) tile<M, 1, true>(left, depth, from, c, column, accumulate, static_cast<int>(width - column));
  }

  // Rows q[k][first .. first + width) as panels [ceil(width / PW)][depth][PW], widened, zero-filled on the right.
  [[gnu::noinline]] static void pack(const S* const* q, int64_t depth, int64_t first, int64_t width, Acc* panels) {
    constexpr int PW = V::kTileVecs * W;
    for (int64_t column = 0; column < width; column += PW) {
      for (int64_t k = 0; k < depth; ++k, panels += PW) {
        const S* from = q[k] + first + column;
        for (int v = 0; v < V::kTileVecs; ++v) {
          const int64_t left = width - column - v * W;
          const Reg x = left >= W ? V::load(from + v * W)
                        : left > 0 ? V::load_n(from + v * W, static_cast<int>(left)) : V::zero();
          V::store(panels + v * W, x);
        }
      }
    }
  }

  template <int M>
  [[gnu::noinline]] static void packed(Left left, int64_t depth, const Acc* panels, Acc* const* c, int64_t first, int64_t width,
                     bool accumulate) {
    constexpr int PW = V::kTileVecs * W;
    for (int64_t column = 0; column < width; column += PW, panels += depth * PW) {
      const int64_t here = width - column;
      const auto from = [&](int64_t k) { return panels + k * PW; };
      if (here >= PW) {
        tile<M, V::kTileVecs, false>(left, depth, from, c, first + column, accumulate, 0);
        continue;
      }
      for (int64_t v = 0; v * W < here; ++v) {
        const auto narrow_from = [&](int64_t k) { return panels + k * PW + v * W; };
        const int tail = static_cast<int>(smaller<int64_t>(W, here - v * W));
        if (tail == W) {
          tile<M, 1, false>(left, depth, narrow_from, c, first + column + v * W, accumulate, 0);
        } else {
          tile<M, 1, true>(left, depth, narrow_from, c, first + column + v * W, accumulate, tail);
        }
      }
    }
  }

  // c(m)[0 .. width) (+)= sum_k left(m, k) q(k)[0 .. width). scratch: kPanelBytes. depth 0 writes zeros unless accumulating.
  template <class QRow, class CRow>
  static void multiply_rows(int64_t rows, int64_t width, int64_t depth, Left left, QRow q_row, CRow c_row, bool accumulate,
                            void* scratch) {
    if (depth == 0 && !accumulate)
      for (int64_t m = 0; m < rows; ++m) std::memset(c_row(m), 0, static_cast<size_t>(width) * sizeof(Acc));
    constexpr int kRows = V::kTileRows;
    const S* q[kPanelDepth];
    Acc* c[kRows];
    for (int64_t k = 0; k < depth; k += kPanelDepth) {
      const int64_t here = smaller(kPanelDepth, depth - k);
      for (int64_t i = 0; i < here; ++i) q[i] = q_row(k + i);
      const bool add = accumulate || k > 0;
      const Left block{left.p + k * left.step_k, left.step_m, left.step_k};
      for (int64_t first = 0; first < width; first += kPanelWidth) {
        const int64_t columns = rows <= kRows ? width : smaller(kPanelWidth, width - first);
        if (rows > kRows) pack(q, here, first, columns, static_cast<Acc*>(scratch));
        for (int64_t m = 0; m < rows; m += kRows) {
          const int count = static_cast<int>(smaller<int64_t>(kRows, rows - m));
          for (int i = 0; i < count; ++i) c[i] = c_row(m + i);
          const Left part{block.p + m * block.step_m, block.step_m, block.step_k};
          with_size<kRows>(count, [&](auto M) {
            if (rows > kRows) {
              packed<M>(part, here, static_cast<const Acc*>(scratch), c, first, columns, add);
            } else {
              direct<M>(part, here, q, c, columns, add);
            }
          });
        }
        if (rows <= kRows) break;
      }
    }
  }
};

}  // namespace
}  // namespace moraine::kernels
