#include "kernels/cpu_primitives.h"
#include "kernels/cpu_vec_scalar.h"

namespace moraine::kernels {

const Backend* scalar_backend(DType dtype) {
  switch (dtype) {
    case DType::kF64:
      return &Cpu<VecScalar<double>, double>::table();
    case DType::kF32:
      return &Cpu<VecScalar<float>, float>::table();
    case DType::kBF16:
      return &Cpu<VecScalar<float>, BFloat16>::table();
    case DType::kF16:
      return &Cpu<VecScalar<float>, Float16>::table();
    default:
      return nullptr;
  }
}

}  // namespace moraine::kernels
