#pragma once

#include <cstdint>
#include <cstring>

/// 16-bit storage types of the CPU kernels. Everything here is static: files compiled for different instruction sets
/// must not share one linker-merged copy.
namespace moraine::kernels {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

[[gnu::always_inline]] static inline float widen(float x) { return x; }
[[gnu::always_inline]] static inline double widen(double x) { return x; }
[[gnu::always_inline]] static inline float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
[[gnu::always_inline]] static inline float widen(Float16 x) {
  _Float16 half;
  std::memcpy(&half, &x.bits, sizeof half);
  return static_cast<float>(half);
}

/// Round to nearest even; NaN stays NaN.
[[gnu::always_inline]] static inline void narrow(float x, float* out) { *out = x; }
[[gnu::always_inline]] static inline void narrow(double x, double* out) { *out = x; }
[[gnu::always_inline]] static inline void narrow(float x, BFloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : rounded);
}
[[gnu::always_inline]] static inline void narrow(float x, Float16* out) {
  const _Float16 half = static_cast<_Float16>(x);
  std::memcpy(&out->bits, &half, sizeof half);
}

}  // namespace moraine::kernels
