#include "kernels/ffn_expert.h"

#include <algorithm>

#include "core/error.h"
#include "kernels/arena.h"
#include "kernels/backend.h"
#include "kernels/checks.h"

namespace moraine::kernels {
namespace {

struct Buffers {
  void *gate_segments, *up_segments, *down_segments;
  void *weighted, *scaled;
  void *u_gate, *u_up, *u_down;      // forward; in backward w u of one projection at a time is in u_gate
  void *v, *v_gate, *v_up, *v_down;  // backward: v of one projection at a time, then w v of each
  void *h, *da, *db;                 // [P, f]
  void* scratch;
};

int64_t widest_rank(const FfnExperts& x) { return std::max({max_rank(x.gate), max_rank(x.up), max_rank(x.down)}); }

Buffers cut(Arena& arena, const Backend& backend, const FfnExperts& x, int64_t pairs, bool backward) {
  const size_t accumulate = accumulate_size(x.gate.dtype);
  const auto pair_bytes = [&](int64_t rank) {
    return static_cast<size_t>(pair_buffer_bound(pairs, rank)) * backend.pair_size;
  };
  const size_t hidden = static_cast<size_t>(pairs * x.gate.d_out) * core::size_of(x.gate.dtype);
  Buffers b{};
  b.gate_segments = arena.take_bytes(backend.segments_bytes(x.gate.num_experts));
  b.up_segments = arena.take_bytes(backend.segments_bytes(x.gate.num_experts));
  b.down_segments = arena.take_bytes(backend.segments_bytes(x.gate.num_experts));
  b.weighted = arena.take_bytes(static_cast<size_t>(pairs) * accumulate);
  b.scaled = arena.take_bytes(static_cast<size_t>(pairs) * accumulate);
  b.u_gate = arena.take_bytes(pair_bytes(backward ? widest_rank(x) : max_rank(x.gate)));
  if (!backward) {
    b.u_up = arena.take_bytes(pair_bytes(max_rank(x.up)));
    b.u_down = arena.take_bytes(pair_bytes(max_rank(x.down)));
  } else {
    b.v = arena.take_bytes(static_cast<size_t>(pair_buffer_bound(pairs, widest_rank(x))) * accumulate);
    b.v_gate = arena.take_bytes(pair_bytes(max_rank(x.gate)));
    b.v_up = arena.take_bytes(pair_bytes(max_rank(x.up)));
    b.v_down = arena.take_bytes(pair_bytes(max_rank(x.down)));
    b.da = arena.take_bytes(hidden);
    b.db = arena.take_bytes(hidden);
  }
  b.h = arena.take_bytes(hidden);
  b.scratch = arena.take_bytes(backend.scratch_bytes(pairs, widest_rank(x), std::max(x.gate.d_in, x.gate.d_out)));
  return b;
}

size_t workspace_bytes(const FfnExperts& x, int64_t tokens, int64_t slots, const Exec& exec, bool backward) {
  Arena arena;
  cut(arena, backend_for(exec, x.gate.dtype), x, tokens * slots, backward);
  return arena.used();
}

void check_ffn(const FfnExperts* x, const Route* route, const void* gates, const Exec& exec, const char* who) {
  MORAINE_CHECK(x != nullptr, "{}: experts missing", who);
  for (const RaggedExperts* part : {&x->gate, &x->up, &x->down}) {
    check_experts(*part, exec, who);
    check_route(route, *part, who);
    MORAINE_CHECK(part->dtype == x->gate.dtype, "{}: dtypes differ: {} and {}", who,
                  core::safetensors_name(part->dtype), core::safetensors_name(x->gate.dtype));
    MORAINE_CHECK(!part->dense() || total_rank(*part) == 0,
                  "{}: full-size experts are not routed through this operation", who);
  }
  MORAINE_CHECK(x->up.d_in == x->gate.d_in && x->up.d_out == x->gate.d_out && x->down.d_in == x->gate.d_out &&
                    x->down.d_out == x->gate.d_in,
                "{}: shapes differ: gate {} -> {}, up {} -> {}, down {} -> {}", who, x->gate.d_in, x->gate.d_out,
                x->up.d_in, x->up.d_out, x->down.d_in, x->down.d_out);
  check_gates(gates, *route, x->gate.dtype, exec, who);
}

void check_saved(const FfnSaved& saved, const FfnExperts& x, const Route& route, const char* who) {
  if (route.pairs() == 0) return;
  MORAINE_CHECK(saved.a != nullptr && saved.b != nullptr, "{}: saved a or b missing", who);
  MORAINE_CHECK((saved.u_gate != nullptr || max_rank(x.gate) == 0) && (saved.u_up != nullptr || max_rank(x.up) == 0) &&
                    (saved.u_down != nullptr || max_rank(x.down) == 0),
                "{}: a saved u is missing", who);
}

Segments segments_of(const Backend& backend, const RaggedExperts& experts, const Route& route, void* storage,
                     const Exec& exec) {
  return backend.make_segments(route, device_row_offsets(experts, exec), max_rank(experts), storage, exec);
}

}  // namespace

FfnSavedSizes ffn_saved_sizes(const FfnExperts& x, int64_t pairs, Device device) {
  const size_t element = device == Device::kCuda ? core::size_of(x.gate.dtype) : accumulate_size(x.gate.dtype);
  const auto pair_bytes = [&](const RaggedExperts& part) {
    return static_cast<size_t>(pair_buffer_bound(pairs, max_rank(part))) * element;
  };
  const size_t hidden = static_cast<size_t>(pairs * x.gate.d_out) * core::size_of(x.gate.dtype);
  return {hidden, hidden, pair_bytes(x.gate), pair_bytes(x.up), pair_bytes(x.down)};
}

size_t ffn_forward_workspace(const FfnExperts& experts, int64_t tokens, int64_t slots, const Exec& exec) {
  return workspace_bytes(experts, tokens, slots, exec, false);
}

size_t ffn_backward_workspace(const FfnExperts& experts, int64_t tokens, int64_t slots, const Exec& exec) {
  return workspace_bytes(experts, tokens, slots, exec, true);
}

void ffn_forward(const FfnForward& args, Workspace workspace, const Exec& exec) {
  const char* who = "kernels/ffn forward";
  check_ffn(args.experts, args.route, args.gates, exec, who);
  const FfnExperts& x = *args.experts;
  const Route& route = *args.route;
  const DType dtype = x.gate.dtype;
  const int64_t d = x.gate.d_in, f = x.gate.d_out;
  check_rows(args.x.data, args.x.ld, route.tokens, d, dtype, exec, "kernels/ffn forward: x");
  check_rows(args.gate_base.data, args.gate_base.ld, route.tokens, f, dtype, exec, "kernels/ffn forward: gate_base");
  check_rows(args.up_base.data, args.up_base.ld, route.tokens, f, dtype, exec, "kernels/ffn forward: up_base");
  check_rows(args.hidden_sum.data, args.hidden_sum.ld, route.tokens, f, dtype, exec, "kernels/ffn forward: hidden_sum");
  check_rows(args.y_delta.data, args.y_delta.ld, route.tokens, d, dtype, exec, "kernels/ffn forward: y_delta");
  if (args.saved != nullptr) check_saved(*args.saved, x, route, who);
  const Backend& backend = backend_for(exec, dtype);
  Arena arena(workspace, who);
  const Buffers b = cut(arena, backend, x, route.pairs(), false);
  arena.check();
  if (route.tokens == 0) return;

  const FfnSaved saved = args.saved != nullptr ? *args.saved : FfnSaved{nullptr, nullptr, b.u_gate, b.u_up, b.u_down};
  const Segments gate = segments_of(backend, x.gate, route, b.gate_segments, exec);
  const Segments up = segments_of(backend, x.up, route, b.up_segments, exec);
  const Segments down = segments_of(backend, x.down, route, b.down_segments, exec);
  const PairRows tokens{args.x.data, args.x.ld, route.slots}, hidden{b.h, f, 1};
  backend.shrink({&route, gate, tokens, x.gate.a, d, saved.u_gate}, b.scratch, exec);
  backend.shrink({&route, up, tokens, x.up.a, d, saved.u_up}, b.scratch, exec);
  backend.ffn_hidden({&route,
                      {gate, saved.u_gate, x.gate.bt},
                      {up, saved.u_up, x.up.bt},
                      x.gate.scale,
                      x.up.scale,
                      args.gates,
                      args.gate_base,
                      args.up_base,
                      f,
                      saved.a,
                      saved.b,
                      b.h,
                      args.hidden_sum},
                     b.scratch, exec);
  backend.shrink({&route, down, hidden, x.down.a, f, saved.u_down}, b.scratch, exec);
  backend.weights({&route, args.gates, x.down.scale, b.weighted, b.scaled}, exec);
  backend.combine({&route, {{down, saved.u_down, x.down.bt}, {}}, 1, b.weighted, d, {}, args.y_delta}, b.scratch, exec);
}

void ffn_backward(const FfnBackward& args, Workspace workspace, const Exec& exec) {
  const char* who = "kernels/ffn backward";
  check_ffn(args.experts, args.route, args.gates, exec, who);
  const FfnExperts& x = *args.experts;
  const Route& route = *args.route;
  const DType dtype = x.gate.dtype;
  const int64_t d = x.gate.d_in, f = x.gate.d_out;
  check_rows(args.x.data, args.x.ld, route.tokens, d, dtype, exec, "kernels/ffn backward: x");
  check_rows(args.dy.data, args.dy.ld, route.tokens, d, dtype, exec, "kernels/ffn backward: dy");
  check_rows(args.q.data, args.q.ld, route.tokens, f, dtype, exec, "kernels/ffn backward: q");
  check_rows(args.dgate_base.data, args.dgate_base.ld, route.tokens, f, dtype, exec,
             "kernels/ffn backward: dgate_base");
  check_rows(args.dup_base.data, args.dup_base.ld, route.tokens, f, dtype, exec, "kernels/ffn backward: dup_base");
  if (args.dx_delta.data != nullptr)
    check_rows(args.dx_delta.data, args.dx_delta.ld, route.tokens, d, dtype, exec, "kernels/ffn backward: dx_delta");
  MORAINE_CHECK(args.saved != nullptr, "{}: what forward saved is missing", who);
  MORAINE_CHECK(args.dgates != nullptr || route.pairs() == 0, "{}: dgates missing", who);
  check_saved(*args.saved, x, route, who);
  const Backend& backend = backend_for(exec, dtype);
  Arena arena(workspace, who);
  const Buffers b = cut(arena, backend, x, route.pairs(), true);
  arena.check();

  const FfnSaved& saved = *args.saved;
  const Segments gate = segments_of(backend, x.gate, route, b.gate_segments, exec);
  const Segments up = segments_of(backend, x.up, route, b.up_segments, exec);
  const Segments down = segments_of(backend, x.down, route, b.down_segments, exec);
  const PairRows tokens{args.x.data, args.x.ld, route.slots}, dy{args.dy.data, args.dy.ld, route.slots};
  const PairRows hidden{b.h, f, 1}, da{b.da, f, 1}, db{b.db, f, 1};

  // Down projection, as in delta_backward with h for x; its dx is dh, consumed by the activation below.
  backend.weights({&route, args.gates, x.down.scale, b.weighted, b.scaled}, exec);
  backend.shrink_unrounded({&route, down, dy, x.down.bt, d, b.v}, b.scratch, exec);
  backend.scale_pairs(
      {&route, down, saved.u_down, b.v, b.weighted, x.down.scale, b.u_gate, b.v_down, args.dgates, false}, exec);
  if (args.dbt_down != nullptr)
    backend.outer({&route, down, b.u_gate, dy, d, args.dbt_down, args.grads}, b.scratch, exec);
  backend.ffn_hidden_backward({&route,
                               {down, b.v_down, x.down.a},
                               args.gates,
                               args.q,
                               f,
                               saved.a,
                               saved.b,
                               b.h,
                               b.da,
                               b.db,
                               args.dgate_base,
                               args.dup_base,
                               args.dgates},
                              b.scratch, exec);
  if (args.da_down != nullptr)
    backend.outer({&route, down, b.v_down, hidden, f, args.da_down, args.grads}, b.scratch, exec);

  // Gate and up projections: upstream da and db, weight s_e alone.
  const auto input_side = [&](const RaggedExperts& part, const Segments& segments, const PairRows& upstream,
                              const void* u, void* v, void* da_out, void* dbt_out) {
    backend.weights({&route, args.gates, part.scale, b.weighted, b.scaled}, exec);
    backend.shrink_unrounded({&route, segments, upstream, part.bt, f, b.v}, b.scratch, exec);
    backend.scale_pairs({&route, segments, u, b.v, b.scaled, part.scale, b.u_gate, v, nullptr, false}, exec);
    if (da_out != nullptr) backend.outer({&route, segments, v, tokens, d, da_out, args.grads}, b.scratch, exec);
    if (dbt_out != nullptr)
      backend.outer({&route, segments, b.u_gate, upstream, f, dbt_out, args.grads}, b.scratch, exec);
  };
  input_side(x.gate, gate, da, saved.u_gate, b.v_gate, args.da_gate, args.dbt_gate);
  input_side(x.up, up, db, saved.u_up, b.v_up, args.da_up, args.dbt_up);
  if (args.dx_delta.data != nullptr)
    backend.combine({&route, {{gate, b.v_gate, x.gate.a}, {up, b.v_up, x.up.a}}, 2, nullptr, d, {}, args.dx_delta},
                    b.scratch, exec);
}

}  // namespace moraine::kernels
