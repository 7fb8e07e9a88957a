// The AVX-512 families with their vectors written out in plain C++, so that their tile shapes, tails and packing run on
// any processor. The intrinsics themselves (cpu_vec_x86.h) are only run where the processor has them.
#include <cmath>

#include "kernels/cpu_primitives.h"

namespace moraine::kernels {
namespace {

struct VecHost512 {
  using Scalar = float;
  static constexpr int kWidth = 16;
  typedef float Reg __attribute__((vector_size(64)));
  static constexpr int kDotRows[5] = {0, 8, 8, 7, 6};
  static constexpr int kTileRows = 6, kTileVecs = 4;
  static constexpr int kDirectVecs[kTileRows + 1] = {0, 8, 8, 6, 4, 4, 4};

  static Reg zero() { return Reg{}; }
  [[gnu::noinline]] static Reg set1(float x) { return Reg{} + x; }
  [[gnu::noinline]] static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }  // rounded twice, unlike the instruction
  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg mul(Reg a, Reg b) { return a * b; }
  template <class S>
  static Reg load(const S* p) {
    return load_n(p, kWidth);
  }
  template <class S>
  [[gnu::noinline]] static Reg load_n(const S* p, int n) {
    Reg out{};
    for (int i = 0; i < n; ++i) out[i] = widen(p[i]);
    return out;
  }
  template <class S>
  static void store(S* p, Reg x) {
    store_n(p, x, kWidth);
  }
  template <class S>
  [[gnu::noinline]] static void store_n(S* p, Reg x, int n) {
    for (int i = 0; i < n; ++i) narrow(x[i], p + i);
  }
  [[gnu::noinline]] static float sum(Reg x) {
    for (int half = kWidth / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) x[i] += x[i + half];
    return x[0];
  }
  static void sum4(Reg a, Reg b, Reg c, Reg d, float* out) {
    out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
  }
  [[gnu::noinline]] static Reg sigmoid(Reg x) {
    for (int i = 0; i < kWidth; ++i) x[i] = 1.0f / (1.0f + std::exp(-x[i]));
    return x;
  }
};

struct VecHost512Bf16 : VecHost512 {
  static constexpr int kPairWidth = 32;
  [[gnu::noinline]] static Reg dot_pairs(const BFloat16* x, const BFloat16* a, Reg c) {
    for (int i = 0; i < kWidth; ++i)
      c[i] = std::fma(widen(x[2 * i]), widen(a[2 * i]), std::fma(widen(x[2 * i + 1]), widen(a[2 * i + 1]), c[i]));
    return c;
  }
};

}  // namespace

bool path_available(Path path) { return path != Path::kAvx2; }
const Backend* avx2_backend(DType) { return nullptr; }
const Backend* avx512_backend(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return &Cpu<VecHost512, float>::table();
    case DType::kBF16:
      return &Cpu<VecHost512, BFloat16>::table();
    default:
      return scalar_backend(dtype);  // F16 and F64 add no shapes
  }
}
const Backend* avx512_bf16_backend(DType dtype) {
  return dtype == DType::kBF16 ? &Cpu<VecHost512Bf16, BFloat16>::table() : avx512_backend(dtype);
}

}  // namespace moraine::kernels
