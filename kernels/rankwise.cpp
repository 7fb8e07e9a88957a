#include "kernels/rankwise.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "core/error.h"
#include "kernels/arena.h"
#include "kernels/backend.h"
#include "kernels/checks.h"

namespace moraine::kernels {
namespace {

// One expert that takes every token, and room for u, v and their masked forms.
struct Buffers {
  void *index, *route_storage, *segments;
  size_t route_bytes;
  void *v, *masked_u, *masked_v;
  int64_t *token_begin, *rank_begin;
  int32_t *ranks, *tokens_of;
  void* scratch;
};

// Selected elements up to which the selected ones alone are computed: reading them one token at a time is half as fast.
int64_t most_selected(int64_t tokens, int64_t rank) { return tokens * rank / 2; }

Buffers cut(Arena& arena, const Backend& backend, const RankwiseAdapter& adapter, int64_t tokens, const Exec& exec) {
  const size_t row = static_cast<size_t>(tokens * padded_rank(adapter.rank));
  Buffers b{};
  b.index = arena.take<int32_t>(tokens);
  b.route_bytes = route_bytes(tokens, 1, 1, exec.device);
  b.route_storage = arena.take_bytes(b.route_bytes);
  b.segments = arena.take_bytes(backend.segments_bytes(1));
  b.v = arena.take_bytes(row * accumulate_size(adapter.dtype));
  b.masked_u = arena.take_bytes(row * backend.pair_size);
  b.masked_v = arena.take_bytes(row * backend.pair_size);
  if (backend.selected != nullptr) {
    b.token_begin = arena.take<int64_t>(tokens + 1);
    b.rank_begin = arena.take<int64_t>(adapter.rank + 1);
    b.ranks = arena.take<int32_t>(most_selected(tokens, adapter.rank));
    b.tokens_of = arena.take<int32_t>(most_selected(tokens, adapter.rank));
  }
  b.scratch = arena.take_bytes(backend.scratch_bytes(tokens, adapter.rank, std::max(adapter.d_in, adapter.d_out)));
  return b;
}

// Everything the three entry points share: checks, buffers, route.
struct Call {
  const Backend& backend;
  Buffers b;
  Route route;
  int64_t row_offsets[2];
  Segments segments;

  Call(const RankwiseAdapter& x, int64_t tokens, Workspace workspace, const Exec& exec, const char* who)
      : backend(backend_for(exec, x.dtype)), row_offsets{0, x.rank} {
    const float one = 1.0f;
    check_experts(
        {1, x.d_in, x.d_out, x.dtype, x.a, x.rank == 0 ? &one : x.bt, row_offsets, x.row_offsets_device, &one}, exec,
        who);
    MORAINE_CHECK(x.rank == 0 || x.bt != nullptr, "{}: bt missing", who);
    MORAINE_CHECK(std::isfinite(x.scale), "{}: scale is not finite", who);
    Arena arena(workspace, who);
    b = cut(arena, backend, x, tokens, exec);
    arena.check();
    Exec unchecked = exec;
    unchecked.check_inputs = false;
    if (exec.device == Device::kCuda) {
      cuda_zero(b.index, static_cast<size_t>(tokens) * sizeof(int32_t), exec);
    } else {
      std::memset(b.index, 0, static_cast<size_t>(tokens) * sizeof(int32_t));
    }
    route =
        route_build(static_cast<const int32_t*>(b.index), tokens, 1, 1, {b.route_storage, b.route_bytes}, unchecked);
    const int64_t* offsets = exec.device == Device::kCuda ? x.row_offsets_device : row_offsets;
    segments = backend.make_segments(route, offsets, x.rank, b.segments, exec);
  }
};

// The selection a mask stands for, in b's arrays. False when it selects too much for that.
template <class F>
bool list_selected(const F* mask, Selection& s, const Buffers& b) {
  std::fill_n(b.rank_begin, s.rank + 1, int64_t{0});
  const int64_t most = most_selected(s.tokens, s.rank);
  int64_t count = 0;
  for (int64_t t = 0; t < s.tokens; ++t) {
    b.token_begin[t] = count;
    for (int64_t i = 0; i < s.rank; ++i) {
      if (mask[t * s.ld + i] == 0) continue;
      if (count == most) return false;
      b.ranks[count++] = static_cast<int32_t>(i);
      ++b.rank_begin[i];
    }
  }
  b.token_begin[s.tokens] = count;
  for (int64_t i = 0, begin = 0; i <= s.rank; ++i) begin += std::exchange(b.rank_begin[i], begin);
  for (int64_t t = 0; t < s.tokens; ++t)
    for (int64_t k = b.token_begin[t]; k < b.token_begin[t + 1]; ++k)
      b.tokens_of[b.rank_begin[b.ranks[k]]++] = static_cast<int32_t>(t);
  for (int64_t i = s.rank; i > 0; --i) b.rank_begin[i] = b.rank_begin[i - 1];
  b.rank_begin[0] = 0;
  s.token_begin = b.token_begin, s.ranks = b.ranks, s.rank_begin = b.rank_begin, s.tokens_of = b.tokens_of;
  return true;
}

// The selection where the backend can leave out what is not selected and that is most of it.
std::optional<Selection> selection_of(const Backend& backend, const RankwiseAdapter& x, int64_t tokens,
                                      const void* mask, const Buffers& b) {
  Selection s{tokens, x.rank, padded_rank(x.rank), nullptr, nullptr, nullptr, nullptr};
  if (backend.selected == nullptr || tokens * x.rank == 0) return std::nullopt;
  const bool few = x.dtype == DType::kF64 ? list_selected(static_cast<const double*>(mask), s, b)
                                          : list_selected(static_cast<const float*>(mask), s, b);
  return few ? std::optional(s) : std::nullopt;
}

template <class F>
void select_rows(const F* score, int64_t tokens, int64_t rank, int64_t keep, bool by_magnitude, F* mask) {
  const int64_t ld = padded_rank(rank);
  std::vector<int64_t> order(static_cast<size_t>(rank));
  for (int64_t t = 0; t < tokens; ++t, score += ld, mask += ld) {
    for (int64_t i = 0; i < rank; ++i)
      if (std::isnan(score[i]))
        throw core::UserError(fmt::format("kernels/rankwise: score of token {} rank {} is NaN", t, i),
                              "check the tokens and the adapter's A for NaN or Inf");
    std::iota(order.begin(), order.end(), 0);
    const auto key = [&](int64_t i) { return by_magnitude ? std::abs(score[i]) : score[i]; };
    std::partial_sort(order.begin(), order.begin() + keep, order.end(), [&](int64_t a, int64_t b) {
      return key(a) != key(b) ? key(a) > key(b) : a < b;  // ties to the lower rank
    });
    std::fill(mask, mask + ld, F(0));
    for (int64_t i = 0; i < keep; ++i) mask[order[static_cast<size_t>(i)]] = F(1);
  }
}

}  // namespace

size_t rankwise_workspace(const RankwiseAdapter& adapter, int64_t tokens, const Exec& exec) {
  Arena arena;
  cut(arena, backend_for(exec, adapter.dtype), adapter, tokens, exec);
  return arena.used();
}

void rankwise_project(const RankwiseAdapter& x, ConstRows in, int64_t tokens, void* u, Workspace workspace,
                      const Exec& exec) {
  const char* who = "kernels/rankwise project";
  check_rows(in.data, in.ld, tokens, x.d_in, x.dtype, exec, "kernels/rankwise project: x");
  MORAINE_CHECK(u != nullptr || tokens * x.rank == 0, "{}: u missing", who);
  Call call(x, tokens, workspace, exec, who);
  call.backend.shrink_unrounded({&call.route, call.segments, {in.data, in.ld, 1}, x.a, x.d_in, u}, call.b.scratch,
                                exec);
}

void rankwise_select(const void* score, int64_t tokens, int64_t rank, int64_t keep, bool by_magnitude, DType dtype,
                     void* mask) {
  if (keep < 0 || keep > rank)
    throw core::UserError(fmt::format("kernels/rankwise: cannot keep {} of {} ranks", keep, rank),
                          "choose between 0 and the adapter's rank");
  if (dtype == DType::kF64) {
    select_rows(static_cast<const double*>(score), tokens, rank, keep, by_magnitude, static_cast<double*>(mask));
  } else {
    select_rows(static_cast<const float*>(score), tokens, rank, keep, by_magnitude, static_cast<float*>(mask));
  }
}

void rankwise_forward(const RankwiseForward& args, Workspace workspace, const Exec& exec) {
  const char* who = "kernels/rankwise forward";
  MORAINE_CHECK(args.adapter != nullptr, "{}: adapter missing", who);
  const RankwiseAdapter& x = *args.adapter;
  check_rows(args.y.data, args.y.ld, args.tokens, x.d_out, x.dtype, exec, "kernels/rankwise forward: y");
  if (args.y0.data != nullptr)
    check_rows(args.y0.data, args.y0.ld, args.tokens, x.d_out, x.dtype, exec, "kernels/rankwise forward: y0");
  MORAINE_CHECK((args.u != nullptr && args.mask != nullptr) || args.tokens * x.rank == 0, "{}: u or mask missing", who);
  Call call(x, args.tokens, workspace, exec, who);
  const Buffers& b = call.b;
  call.backend.mask(
      {args.tokens, padded_rank(x.rank), x.scale, args.u, nullptr, args.mask, b.masked_u, nullptr, nullptr}, exec);
  if (const auto selected = selection_of(call.backend, x, args.tokens, args.mask, b)) {
    call.backend.selected->expand({&*selected, b.masked_u, x.bt, x.d_out, args.y0, args.y}, exec);
  } else {
    call.backend.combine({&call.route, {{call.segments, b.masked_u, x.bt}, {}}, 1, nullptr, x.d_out, args.y0, args.y},
                         b.scratch, exec);
  }
}

void rankwise_backward(const RankwiseBackward& args, Workspace workspace, const Exec& exec) {
  const char* who = "kernels/rankwise backward";
  MORAINE_CHECK(args.adapter != nullptr, "{}: adapter missing", who);
  const RankwiseAdapter& x = *args.adapter;
  check_rows(args.x.data, args.x.ld, args.tokens, x.d_in, x.dtype, exec, "kernels/rankwise backward: x");
  check_rows(args.dy.data, args.dy.ld, args.tokens, x.d_out, x.dtype, exec, "kernels/rankwise backward: dy");
  if (args.dx.data != nullptr)
    check_rows(args.dx.data, args.dx.ld, args.tokens, x.d_in, x.dtype, exec, "kernels/rankwise backward: dx");
  if (args.dx0.data != nullptr)
    check_rows(args.dx0.data, args.dx0.ld, args.tokens, x.d_in, x.dtype, exec, "kernels/rankwise backward: dx0");
  MORAINE_CHECK((args.u != nullptr && args.mask != nullptr) || args.tokens * x.rank == 0, "{}: u or mask missing", who);
  Call call(x, args.tokens, workspace, exec, who);
  const Buffers& b = call.b;
  const PairRows in{args.x.data, args.x.ld, 1}, dy{args.dy.data, args.dy.ld, 1};
  const auto selected = selection_of(call.backend, x, args.tokens, args.mask, b);
  if (selected && args.dmask == nullptr) {
    call.backend.selected->shrink({&*selected, args.dy, x.bt, x.d_out, b.v}, exec);
  } else {  // the gradient of a mask needs v of every rank
    call.backend.shrink_unrounded({&call.route, call.segments, dy, x.bt, x.d_out, b.v}, b.scratch, exec);
  }
  call.backend.mask(
      {args.tokens, padded_rank(x.rank), x.scale, args.u, b.v, args.mask, b.masked_u, b.masked_v, args.dmask}, exec);
  const auto expand = [&](const void* values, const void* matrix, int64_t width, const ConstRows& base,
                          const Rows& out) {
    if (selected) return call.backend.selected->expand({&*selected, values, matrix, width, base, out}, exec);
    call.backend.combine({&call.route, {{call.segments, values, matrix}, {}}, 1, nullptr, width, base, out}, b.scratch,
                         exec);
  };
  const auto outer = [&](const void* values, const PairRows& rows, int64_t width, void* out) {
    if (selected)
      return call.backend.selected->outer({&*selected, values, {rows.data, rows.ld}, width, out, args.accumulate},
                                          b.scratch, exec);
    call.backend.outer({&call.route, call.segments, values, rows, width, out,
                        args.accumulate ? WeightGrads::kAccumulate : WeightGrads::kOverwrite},
                       b.scratch, exec);
  };
  if (args.dx.data != nullptr) expand(b.masked_v, x.a, x.d_in, args.dx0, args.dx);
  if (args.da != nullptr) outer(b.masked_v, in, x.d_in, args.da);
  if (args.dbt != nullptr) outer(b.masked_u, dy, x.d_out, args.dbt);
}

}  // namespace moraine::kernels
