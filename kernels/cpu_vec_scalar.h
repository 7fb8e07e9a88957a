#pragma once

#include <cmath>

#include "kernels/cpu_storage.h"

namespace moraine::kernels {
namespace {

/// A "vector" of one element: the portable path, and the only one for double. The other vector types (cpu_vec_x86.h)
/// offer the same members; kernels are templates over them.
///
/// kDotRows[n]: tokens of a dot tile with n weight rows; kTileRows x kTileVecs: broadcast tile; kDirectVecs[m]: vectors
/// per row when m rows are computed straight from the weights. They fill the register file and never change a result.
template <class F>
struct VecScalar {
  using Scalar = F;
  using Reg = F;
  static constexpr int kWidth = 1;
  static constexpr int kDotRows[5] = {0, 4, 4, 2, 2};
  static constexpr int kTileRows = 4, kTileVecs = 4;
  static constexpr int kDirectVecs[kTileRows + 1] = {0, 8, 4, 4, 4};

  static Reg zero() { return 0; }
  static Reg set1(F x) { return x; }
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg mul(Reg a, Reg b) { return a * b; }
  template <class S>
  static Reg load(const S* p) {
    return widen(*p);
  }
  template <class S>
  static Reg load_n(const S* p, int) {
    return widen(*p);
  }
  template <class S>
  static void store(S* p, Reg x) {
    narrow(x, p);
  }
  template <class S>
  static void store_n(S* p, Reg x, int) {
    narrow(x, p);
  }
  static F sum(Reg x) { return x; }
  static void sum4(Reg a, Reg b, Reg c, Reg d, F* out) { out[0] = a, out[1] = b, out[2] = c, out[3] = d; }
  static Reg sigmoid(Reg x) { return F(1) / (F(1) + std::exp(-x)); }
};

}  // namespace
}  // namespace moraine::kernels
