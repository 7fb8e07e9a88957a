#include "kernels/checks.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "kernels/backend.h"

namespace moraine::kernels {
namespace {

bool aligned(const void* p, DType dtype, const Exec& exec) {
  const size_t alignment = exec.device == Device::kCuda ? 16 : core::size_of(dtype);
  return reinterpret_cast<uintptr_t>(p) % alignment == 0;
}

template <class F>
int64_t first_not_finite(const void* gates, int64_t n) {
  const F* g = static_cast<const F*>(gates);
  return std::find_if(g, g + n, [](F x) { return !std::isfinite(x); }) - g;
}

}  // namespace

int64_t max_rank(const RaggedExperts& x) {
  int64_t most = 0;
  for (int64_t e = 0; e < x.num_experts; ++e) most = std::max(most, x.row_offsets[e + 1] - x.row_offsets[e]);
  return most;
}

int64_t total_rank(const RaggedExperts& x) { return x.num_experts == 0 ? 0 : x.row_offsets[x.num_experts]; }

const int64_t* device_row_offsets(const RaggedExperts& x, const Exec& exec) {
  return exec.device == Device::kCuda ? x.row_offsets_device : x.row_offsets;
}

void check_experts(const RaggedExperts& x, const Exec& exec, const char* who) {
  MORAINE_CHECK(x.num_experts >= 0 && x.d_in >= 1 && x.d_out >= 1, "{}: bad shape: experts={} d_in={} d_out={}", who,
                x.num_experts, x.d_in, x.d_out);
  if (x.num_experts == 0) return;
  MORAINE_CHECK(x.row_offsets != nullptr && x.scale != nullptr, "{}: row offsets or scale missing", who);
  MORAINE_CHECK(x.row_offsets[0] == 0, "{}: row offsets must start at 0: {}", who, x.row_offsets[0]);
  for (int64_t e = 0; e < x.num_experts; ++e) {
    const int64_t rank = x.row_offsets[e + 1] - x.row_offsets[e];
    MORAINE_CHECK(rank >= 0, "{}: row offsets decrease at expert {}", who, e);
    MORAINE_CHECK(!x.dense() || rank == 0 || rank == x.d_out, "{}: dense expert {} has {} rows, d_out is {}", who, e,
                  rank, x.d_out);
  }
  MORAINE_CHECK(total_rank(x) == 0 || x.a != nullptr, "{}: weights missing", who);
  MORAINE_CHECK(aligned(x.a, x.dtype, exec) && aligned(x.bt, x.dtype, exec), "{}: weights are not aligned", who);
  if (exec.device == Device::kCuda) {
    MORAINE_CHECK(x.row_offsets_device != nullptr, "{}: device copy of the row offsets missing", who);
    MORAINE_CHECK(x.d_in % 8 == 0 && x.d_out % 8 == 0, "{}: CUDA needs widths that are multiples of 8: {} and {}", who,
                  x.d_in, x.d_out);
  }
}

void check_rows(const void* data, int64_t ld, int64_t tokens, int64_t width, DType dtype, const Exec& exec,
                const char* who) {
  if (tokens == 0) return;
  MORAINE_CHECK(data != nullptr, "{}: missing", who);
  MORAINE_CHECK(ld >= width, "{}: leading dimension {} is below the width {}", who, ld, width);
  MORAINE_CHECK(aligned(data, dtype, exec), "{}: not aligned for {}", who, core::safetensors_name(dtype));
  MORAINE_CHECK(exec.device == Device::kCpu || ld % 8 == 0,
                "{}: CUDA needs a leading dimension that is a multiple of 8: {}", who, ld);
}

void check_route(const Route* route, const RaggedExperts& experts, const char* who) {
  MORAINE_CHECK(route != nullptr, "{}: route missing", who);
  MORAINE_CHECK(route->experts == experts.num_experts, "{}: route is for {} experts, the weights hold {}", who,
                route->experts, experts.num_experts);
}

void check_gates(const void* gates, const Route& route, DType dtype, const Exec& exec, const char* who) {
  const int64_t n = route.pairs();
  if (n == 0) return;
  MORAINE_CHECK(gates != nullptr, "{}: gates missing", who);
  if (!exec.check_inputs) return;
  if (exec.device == Device::kCuda) return cuda_check_finite(gates, n, exec);
  const int64_t bad = dtype == DType::kF64 ? first_not_finite<double>(gates, n) : first_not_finite<float>(gates, n);
  if (bad < n)
    throw core::NumericError(
        fmt::format("{}: gate of token {} slot {} is not finite", who, bad / route.slots, bad % route.slots),
        "check the router's logits: they or the tokens hold NaN or Inf");
}

}  // namespace moraine::kernels
