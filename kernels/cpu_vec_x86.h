#pragma once

#include <immintrin.h>

#include "kernels/cpu_storage.h"

/// AVX2 and AVX-512 vectors of floats. Include only in files compiled for the instruction set. Everything has internal
/// linkage: were it merged across files, the linker could pick a copy this processor cannot run.
namespace moraine::kernels {
namespace {

/// exp for vectors (Cephes coefficients, error about 1 ulp), clamped so that the result is finite; NaN stays NaN.
template <class V>
[[gnu::always_inline]] static inline typename V::Reg vector_exp(typename V::Reg x) {
  x = V::min(V::set1(88.0f), V::max(V::set1(-87.0f), x));
  const auto n = V::round(V::mul(x, V::set1(1.44269504088896341f)));
  x = V::fma(n, V::set1(-0.693359375f), x);
  x = V::fma(n, V::set1(2.12194440e-4f), x);
  auto p = V::set1(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    p = V::fma(p, x, V::set1(c));
  }
  p = V::fma(V::mul(p, x), x, V::add(x, V::set1(1.0f)));
  return V::scale_by_power(p, n);
}

/// Loads and stores of fewer than kWidth elements, by way of a full-width buffer.
template <class V, class S>
[[gnu::always_inline]] static inline typename V::Reg load_tail(const S* p, int n) {
  S buffer[V::kWidth] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return V::load(buffer);
}
template <class V, class S>
[[gnu::always_inline]] static inline void store_tail(S* p, typename V::Reg x, int n) {
  S buffer[V::kWidth];
  V::store(buffer, x);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
}

#if defined(__AVX2__)
/// ((x0 + x1) + (x2 + x3)) + ((x4 + x5) + (x6 + x7)), of one vector or of four at once.
[[gnu::always_inline]] inline float sum256(__m256 x) {
  const __m256 pairs = _mm256_hadd_ps(x, x), quads = _mm256_hadd_ps(pairs, pairs);
  return _mm_cvtss_f32(_mm_add_ss(_mm256_castps256_ps128(quads), _mm256_extractf128_ps(quads, 1)));
}
[[gnu::always_inline]] inline void sum4_256(__m256 a, __m256 b, __m256 c, __m256 d, float* out) {
  const __m256 quads = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(quads), _mm256_extractf128_ps(quads, 1)));
}

struct VecAvx2 {
  using Scalar = float;
  using Reg = __m256;
  static constexpr int kWidth = 8;
  static constexpr int kDotRows[5] = {0, 8, 5, 4, 3};
  static constexpr int kTileRows = 6, kTileVecs = 2;
  static constexpr int kDirectVecs[kTileRows + 1] = {0, 8, 4, 4, 2, 2, 2};

  static Reg zero() { return _mm256_setzero_ps(); }
  static Reg set1(float x) { return _mm256_set1_ps(x); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg min(Reg a, Reg b) { return _mm256_min_ps(a, b); }  // b where either is NaN
  static Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static Reg round(Reg x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Reg scale_by_power(Reg x, Reg n) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), exponent));
  }
  static Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static Reg load(const BFloat16* p) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
  }
  static Reg load(const Float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static void store(float* p, Reg x) { _mm256_storeu_ps(p, x); }
  static void store(BFloat16* p, Reg x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff)), 16);
    const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, quiet, nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  static void store(Float16* p, Reg x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  template <class S>
  static Reg load_n(const S* p, int n) {
    return load_tail<VecAvx2>(p, n);
  }
  template <class S>
  static void store_n(S* p, Reg x, int n) {
    store_tail<VecAvx2>(p, x, n);
  }
  static float sum(Reg x) { return sum256(x); }
  static void sum4(Reg a, Reg b, Reg c, Reg d, float* out) { sum4_256(a, b, c, d, out); }
  static Reg sigmoid(Reg x) {
    const Reg one = set1(1.0f);
    return _mm256_div_ps(one, add(one, vector_exp<VecAvx2>(_mm256_xor_ps(x, set1(-0.0f)))));
  }
};
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
struct VecAvx512 {
  using Scalar = float;
  using Reg = __m512;
  static constexpr int kWidth = 16;
  static constexpr int kDotRows[5] = {0, 8, 8, 7, 6};
  static constexpr int kTileRows = 6, kTileVecs = 4;
  static constexpr int kDirectVecs[kTileRows + 1] = {0, 8, 8, 6, 4, 4, 4};

  static Reg zero() { return _mm512_setzero_ps(); }
  static Reg set1(float x) { return _mm512_set1_ps(x); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg min(Reg a, Reg b) { return _mm512_min_ps(a, b); }
  static Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static Reg round(Reg x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Reg scale_by_power(Reg x, Reg n) { return _mm512_scalef_ps(x, n); }
  static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static Reg load(const BFloat16* p) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
  }
  static Reg load(const Float16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static void store(float* p, Reg x) { _mm512_storeu_ps(p, x); }
  static void store(BFloat16* p, Reg x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff)), 16);
    const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
  }
  static void store(Float16* p, Reg x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  template <class S>
  static Reg load_n(const S* p, int n) {
    return load_tail<VecAvx512>(p, n);
  }
  template <class S>
  static void store_n(S* p, Reg x, int n) {
    store_tail<VecAvx512>(p, x, n);
  }
  static __m256 fold(Reg x) {
    return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_castps512_ps256(_mm512_shuffle_f32x4(x, x, 0x0e)));
  }
  static float sum(Reg x) { return sum256(fold(x)); }
  static void sum4(Reg a, Reg b, Reg c, Reg d, float* out) { sum4_256(fold(a), fold(b), fold(c), fold(d), out); }
  static Reg sigmoid(Reg x) {
    const Reg one = set1(1.0f);
    return _mm512_div_ps(one, add(one, vector_exp<VecAvx512>(_mm512_sub_ps(zero(), x))));
  }
};
#endif

#if defined(__AVX512BF16__)
/// bf16 products two by two with vdpbf16ps in dot tiles (denormals are flushed there); all else as VecAvx512.
struct VecAvx512Bf16 : VecAvx512 {
  static constexpr int kPairWidth = 32;
  static Reg dot_pairs(const BFloat16* x, const BFloat16* a, Reg c) {
    return _mm512_dpbf16_ps(c, load_pairs(x), load_pairs(a));
  }
  static __m512bh load_pairs(const BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
};
#endif

}  // namespace
}  // namespace moraine::kernels
