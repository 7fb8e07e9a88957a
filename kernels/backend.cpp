#include "kernels/backend.h"

#include <atomic>

#include "core/error.h"

namespace moraine::kernels {

namespace {
std::atomic<Path> most_wanted{Path::kAvx512Bf16};
}

Path best_path() {
  for (const Path path : {Path::kAvx512Bf16, Path::kAvx512, Path::kAvx2})
    if (path <= most_wanted && path_available(path)) return path;
  return Path::kScalar;
}

void limit_path(Path most) { most_wanted = most; }

const char* path_name(Path path) {
  switch (path) {
    case Path::kAuto:
      return "auto";
    case Path::kScalar:
      return "scalar";
    case Path::kAvx2:
      return "avx2";
    case Path::kAvx512:
      return "avx512";
    case Path::kAvx512Bf16:
      return "avx512_bf16";
  }
  return "?";
}

const Backend& backend_for(const Exec& exec, DType dtype) {
  if (exec.device == Device::kCuda) {
    if (!cuda_available())
      throw core::UserError("kernels: CUDA was asked for, but there is no usable device",
                            "use a build with -DMORAINE_WITH_CUDA=ON on a machine with a GPU, or run on the CPU");
    const Backend* backend = cuda_backend(dtype);
    if (backend == nullptr)
      throw core::UserError(fmt::format("kernels: no CUDA kernels for dtype {}", core::safetensors_name(dtype)),
                            "use BF16, F16 or F32");
    return *backend;
  }
  const Path path = exec.path == Path::kAuto ? best_path() : exec.path;
  if (!path_available(path))
    throw core::UserError(fmt::format("kernels: this processor cannot run the {} path", path_name(path)),
                          "use another path, or leave it at auto");
  const Backend* backend = nullptr;
  if (path == Path::kAvx2) backend = avx2_backend(dtype);
  if (path == Path::kAvx512) backend = avx512_backend(dtype);
  if (path == Path::kAvx512Bf16) backend = avx512_bf16_backend(dtype);
  if (path == Path::kScalar || dtype == DType::kF64) backend = scalar_backend(dtype);
  if (backend == nullptr)
    throw core::UserError(fmt::format("kernels: no kernels for dtype {}", core::safetensors_name(dtype)),
                          "use F32, BF16, F16 or F64");
  return *backend;
}

}  // namespace moraine::kernels
