#include "kernels/ragged_delta.h"

#include <algorithm>

#include "core/error.h"
#include "kernels/arena.h"
#include "kernels/backend.h"
#include "kernels/checks.h"

namespace moraine::kernels {
namespace {

struct Buffers {
  void* segments;
  void *weighted, *scaled;
  void *u, *v, *scaled_u, *scaled_v;
  void* scratch;
};

Buffers cut(Arena& arena, const Backend& backend, const RaggedExperts& experts, int64_t pairs, bool backward) {
  const size_t accumulate = accumulate_size(experts.dtype);
  const int64_t rank = max_rank(experts);
  const size_t pair_bytes = static_cast<size_t>(pair_buffer_bound(pairs, rank)) * backend.pair_size;
  Buffers b{};
  b.segments = arena.take_bytes(backend.segments_bytes(experts.num_experts));
  b.weighted = arena.take_bytes(static_cast<size_t>(pairs) * accumulate);
  b.scaled = arena.take_bytes(static_cast<size_t>(pairs) * accumulate);
  b.u = arena.take_bytes(backward ? 0 : pair_bytes);
  if (backward) {
    b.v = arena.take_bytes(static_cast<size_t>(pair_buffer_bound(pairs, rank)) * accumulate);
    b.scaled_v = arena.take_bytes(pair_bytes);
    b.scaled_u = arena.take_bytes(experts.dense() ? 0 : pair_bytes);
  }
  b.scratch = arena.take_bytes(backend.scratch_bytes(pairs, rank, std::max(experts.d_in, experts.d_out)));
  return b;
}

size_t workspace_bytes(const RaggedExperts& experts, int64_t tokens, int64_t slots, const Exec& exec, bool backward) {
  Arena arena;
  cut(arena, backend_for(exec, experts.dtype), experts, tokens * slots, backward);
  return arena.used();
}

}  // namespace

size_t delta_saved_bytes(const RaggedExperts& experts, int64_t pairs, Device device) {
  const size_t element = device == Device::kCuda ? core::size_of(experts.dtype) : accumulate_size(experts.dtype);
  return static_cast<size_t>(pair_buffer_bound(pairs, max_rank(experts))) * element;
}

size_t delta_forward_workspace(const RaggedExperts& experts, int64_t tokens, int64_t slots, const Exec& exec) {
  return workspace_bytes(experts, tokens, slots, exec, false);
}

size_t delta_backward_workspace(const RaggedExperts& experts, int64_t tokens, int64_t slots, const Exec& exec) {
  return workspace_bytes(experts, tokens, slots, exec, true);
}

void delta_forward(const DeltaForward& args, Workspace workspace, const Exec& exec) {
  const char* who = "kernels/delta forward";
  MORAINE_CHECK(args.experts != nullptr, "{}: experts missing", who);
  const RaggedExperts& experts = *args.experts;
  const Backend& backend = backend_for(exec, experts.dtype);
  check_experts(experts, exec, who);
  check_route(args.route, experts, who);
  const Route& route = *args.route;
  check_gates(args.gates, route, experts.dtype, exec, who);
  check_rows(args.x.data, args.x.ld, route.tokens, experts.d_in, experts.dtype, exec, "kernels/delta forward: x");
  check_rows(args.y.data, args.y.ld, route.tokens, experts.d_out, experts.dtype, exec, "kernels/delta forward: y");
  if (args.y0.data != nullptr)
    check_rows(args.y0.data, args.y0.ld, route.tokens, experts.d_out, experts.dtype, exec, "kernels/delta forward: y0");
  Arena arena(workspace, who);
  const Buffers b = cut(arena, backend, experts, route.pairs(), false);
  arena.check();
  if (route.tokens == 0) return;

  const Segments segments =
      backend.make_segments(route, device_row_offsets(experts, exec), max_rank(experts), b.segments, exec);
  void* u = args.saved_u != nullptr ? args.saved_u : b.u;
  backend.weights({&route, args.gates, experts.scale, b.weighted, b.scaled}, exec);
  backend.shrink({&route, segments, {args.x.data, args.x.ld, route.slots}, experts.a, experts.d_in, u}, b.scratch,
                 exec);
  backend.combine({&route, {{segments, u, experts.bt}, {}}, 1, b.weighted, experts.d_out, args.y0, args.y}, b.scratch,
                  exec);
}

void delta_backward(const DeltaBackward& args, Workspace workspace, const Exec& exec) {
  const char* who = "kernels/delta backward";
  MORAINE_CHECK(args.experts != nullptr, "{}: experts missing", who);
  const RaggedExperts& experts = *args.experts;
  const Backend& backend = backend_for(exec, experts.dtype);
  check_experts(experts, exec, who);
  check_route(args.route, experts, who);
  const Route& route = *args.route;
  check_gates(args.gates, route, experts.dtype, exec, who);
  check_rows(args.x.data, args.x.ld, route.tokens, experts.d_in, experts.dtype, exec, "kernels/delta backward: x");
  check_rows(args.dy.data, args.dy.ld, route.tokens, experts.d_out, experts.dtype, exec, "kernels/delta backward: dy");
  if (args.dx.data != nullptr)
    check_rows(args.dx.data, args.dx.ld, route.tokens, experts.d_in, experts.dtype, exec, "kernels/delta backward: dx");
  if (args.dx0.data != nullptr)
    check_rows(args.dx0.data, args.dx0.ld, route.tokens, experts.d_in, experts.dtype, exec,
               "kernels/delta backward: dx0");
  const bool needs_u = args.dgates != nullptr || args.dbt != nullptr;
  MORAINE_CHECK(!needs_u || args.saved_u != nullptr || route.pairs() == 0 || total_rank(experts) == 0,
                "{}: saved_u of forward is missing", who);
  Arena arena(workspace, who);
  const Buffers b = cut(arena, backend, experts, route.pairs(), true);
  arena.check();

  const Segments segments =
      backend.make_segments(route, device_row_offsets(experts, exec), max_rank(experts), b.segments, exec);
  const PairRows x{args.x.data, args.x.ld, route.slots}, dy{args.dy.data, args.dy.ld, route.slots};
  backend.weights({&route, args.gates, experts.scale, b.weighted, b.scaled}, exec);
  backend.shrink_unrounded({&route, segments, dy, experts.bt, experts.d_out, b.v}, b.scratch, exec);
  void* scaled_u = args.dbt != nullptr && !experts.dense() ? b.scaled_u : nullptr;
  backend.scale_pairs(
      {&route, segments, args.saved_u, b.v, b.weighted, experts.scale, scaled_u, b.scaled_v, args.dgates, false}, exec);
  if (args.dx.data != nullptr)
    backend.combine({&route, {{segments, b.scaled_v, experts.a}, {}}, 1, nullptr, experts.d_in, args.dx0, args.dx},
                    b.scratch, exec);
  if (args.da != nullptr)
    backend.outer({&route, segments, b.scaled_v, x, experts.d_in, args.da, args.grads}, b.scratch, exec);
  if (scaled_u != nullptr)
    backend.outer({&route, segments, scaled_u, dy, experts.d_out, args.dbt, args.grads}, b.scratch, exec);
}

}  // namespace moraine::kernels
