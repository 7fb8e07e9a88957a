#include "kernels/materialise.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/error.h"
#include "kernels/arena.h"
#include "kernels/backend.h"
#include "kernels/checks.h"

namespace moraine::kernels {
namespace {

// The weight rows play the tokens: row i of A and of Bt belongs to the expert that owns it, one slot, weight 1. Then
// W_e = outer(Bt rows, A rows), dA = expand(Bt rows, dW) and dBt = shrink(A rows, dW), with dW_e as E slabs of d_out
// rows.
struct Buffers {
  void *route_storage, *segments, *bt_rows, *product;
  size_t route_bytes;
  int64_t* slab_offsets;
  void* scratch;
};

Buffers cut(Arena& arena, const Backend& backend, const RaggedExperts& x) {
  const int64_t rows = total_rank(x);
  Buffers b{};
  b.route_bytes = route_bytes(rows, 1, x.num_experts, Device::kCpu);
  b.route_storage = arena.take_bytes(b.route_bytes);
  b.segments = arena.take_bytes(backend.segments_bytes(x.num_experts));
  b.slab_offsets = arena.take<int64_t>(x.num_experts + 1);
  b.bt_rows = arena.take_bytes(static_cast<size_t>(pair_buffer_bound(rows, x.d_out)) * backend.pair_size);
  b.product = arena.take_bytes(static_cast<size_t>(rows * std::max(x.d_in, padded_rank(x.d_out))) * backend.pair_size);
  b.scratch = arena.take_bytes(backend.scratch_bytes(rows, x.d_out, std::max(x.d_in, x.d_out)));
  return b;
}

struct Call {
  const Backend& backend;
  Buffers b;
  Route route;
  Segments segments;

  Call(const RaggedExperts& x, Workspace workspace, const Exec& exec, const char* who)
      : backend(backend_for(exec, x.dtype)) {
    if (exec.device == Device::kCuda)
      throw core::UserError(fmt::format("{}: runs on the CPU only", who),
                            "form the product with the caller's BLAS on CUDA");
    check_experts(x, exec, who);
    MORAINE_CHECK(!x.dense() || total_rank(x) == 0, "{}: the experts are dense already", who);
    Arena arena(workspace, who);
    b = cut(arena, backend, x);
    arena.check();
    std::vector<int32_t> owner(static_cast<size_t>(total_rank(x)));
    for (int64_t e = 0; e < x.num_experts; ++e) {
      std::fill(owner.begin() + x.row_offsets[e], owner.begin() + x.row_offsets[e + 1], static_cast<int32_t>(e));
      b.slab_offsets[e] = e * x.d_out;
    }
    b.slab_offsets[x.num_experts] = x.num_experts * x.d_out;
    route = route_build(owner.data(), total_rank(x), 1, x.num_experts, {b.route_storage, b.route_bytes}, exec);
    segments = backend.make_segments(route, b.slab_offsets, x.d_out, b.segments, exec);
  }
  void widen_bt(const RaggedExperts& x, const Exec& exec) {
    backend.shrink({&route, segments, {x.bt, x.d_out, 1}, nullptr, x.d_out, b.bt_rows}, b.scratch, exec);
  }
};

}  // namespace

size_t materialise_workspace(const RaggedExperts& experts, const Exec& exec) {
  Arena arena;
  cut(arena, backend_for(exec, experts.dtype), experts);
  return arena.used();
}

void materialise(const RaggedExperts& x, void* weights, Workspace workspace, const Exec& exec) {
  Call call(x, workspace, exec, "kernels/materialise");
  MORAINE_CHECK(weights != nullptr || x.num_experts == 0, "kernels/materialise: weights missing");
  call.widen_bt(x, exec);
  call.backend.outer(
      {&call.route, call.segments, call.b.bt_rows, {x.a, x.d_in, 1}, x.d_in, weights, WeightGrads::kOverwrite},
      call.b.scratch, exec);
}

void materialise_backward(const RaggedExperts& x, const void* dweights, void* da, void* dbt, Workspace workspace,
                          const Exec& exec) {
  Call call(x, workspace, exec, "kernels/materialise backward");
  MORAINE_CHECK(x.dtype == DType::kF32 || x.dtype == DType::kF64,
                "kernels/materialise backward: dtype {} is not F32 or F64", core::safetensors_name(x.dtype));
  MORAINE_CHECK(dweights != nullptr || x.num_experts == 0, "kernels/materialise backward: dweights missing");
  if (da != nullptr) {
    call.widen_bt(x, exec);
    call.backend.combine(
        {&call.route, {{call.segments, call.b.bt_rows, dweights}, {}}, 1, nullptr, x.d_in, {}, {da, x.d_in}},
        call.b.scratch, exec);
  }
  if (dbt != nullptr) {
    call.backend.shrink({&call.route, call.segments, {x.a, x.d_in, 1}, dweights, x.d_in, call.b.product},
                        call.b.scratch, exec);
    const size_t element = call.backend.pair_size, row = static_cast<size_t>(x.d_out) * element;
    const size_t ld = static_cast<size_t>(padded_rank(x.d_out)) * element;
    for (int64_t i = 0; i < total_rank(x); ++i)
      std::memcpy(static_cast<char*>(dbt) + static_cast<size_t>(i) * row,
                  static_cast<const char*>(call.b.product) + static_cast<size_t>(i) * ld, row);
  }
}

}  // namespace moraine::kernels
