// Compiled for its own instruction set (CMakeLists.txt); called only after a run-time check.
#include "kernels/cpu_primitives.h"
#include "kernels/cpu_vec_x86.h"

namespace moraine::kernels {

const Backend* avx512_backend(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return &Cpu<VecAvx512, float>::table();
    case DType::kBF16:
      return &Cpu<VecAvx512, BFloat16>::table();
    case DType::kF16:
      return &Cpu<VecAvx512, Float16>::table();
    default:
      return nullptr;
  }
}

}  // namespace moraine::kernels
