#include "kernels/types.h"

namespace moraine::kernels {

bool path_available(Path path) {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  switch (path) {
    case Path::kAuto:
    case Path::kScalar:
      return true;
    case Path::kAvx2:
      return avx2;
    case Path::kAvx512:
      return avx512;
    case Path::kAvx512Bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16");
  }
  return false;
}

}  // namespace moraine::kernels
