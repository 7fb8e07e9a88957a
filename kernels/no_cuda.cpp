// Stands in for the CUDA files in a build without CUDA.
#include "core/error.h"
#include "kernels/backend.h"

namespace moraine::kernels {
namespace {
[[noreturn]] void refuse() {
  throw core::UserError("kernels: this build has no CUDA", "configure with -DMORAINE_WITH_CUDA=ON");
}
}  // namespace

bool cuda_available() { return false; }
const Backend* cuda_backend(DType) { return nullptr; }
size_t cuda_route_bytes(int64_t, int64_t, int64_t) { refuse(); }
Route cuda_route_build(const int32_t*, int64_t, int64_t, int64_t, Workspace, const Exec&) { refuse(); }
void cuda_zero(void*, size_t, const Exec&) { refuse(); }
void cuda_check_finite(const void*, int64_t, const Exec&) { refuse(); }

}  // namespace moraine::kernels
