// Compiled for its own instruction set (CMakeLists.txt); called only after a run-time check.
#include "kernels/cpu_primitives.h"
#include "kernels/cpu_vec_x86.h"

namespace moraine::kernels {

const Backend* avx512_bf16_backend(DType dtype) {
  return dtype == DType::kBF16 ? &Cpu<VecAvx512Bf16, BFloat16>::table() : avx512_backend(dtype);
}

}  // namespace moraine::kernels
