// O4, experts of full size and factors multiplied out, against ATen.
#include <algorithm>
#include <cmath>
#include <functional>
#include <random>
#include <vector>

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/index_add.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>

#include "bench/ragged_bench.h"
#include "kernels/materialise.h"
#include "kernels/ragged_delta.h"

using namespace bench;

namespace {

namespace mk = moraine::kernels;
using at::Tensor;

Tensor rows(int64_t n, int64_t d, at::ScalarType dtype) {
  return (at::randn({n, d}) / std::sqrt(static_cast<double>(d))).to(dtype);
}

struct Inputs {
  Tensor x, gates;
  std::vector<Tensor> weights;  // one per expert, as a caller who loops would have
};

}  // namespace

void bench::run_dense(const Request& r, const Peaks& peaks) {
  std::mt19937 engine(static_cast<unsigned>(r.tokens));
  const std::vector<int32_t> index = draw_route(r.routing, r.tokens, r.slots, r.experts, engine);
  std::vector<int64_t> offsets{0};
  for (int64_t e = 0; e < r.experts; ++e) offsets.push_back(offsets.back() + r.d_out);
  const std::vector<int64_t> full(static_cast<size_t>(r.experts), r.d_out);
  const std::vector<Segment> segments = segments_of(index, r.slots, full);
  const Tensor stacked = rows(r.experts * r.d_out, r.d_in, r.dtype), weight = rows(r.d_out, r.d_in, r.dtype);
  std::vector<Tensor> xs;
  for (int i = 0; i < 4; ++i) xs.push_back(at::randn({r.tokens, r.d_in}).to(r.dtype));
  const Tensor y0 = at::randn({r.tokens, r.d_out}).to(r.dtype), dy = at::randn({r.tokens, r.d_out}).to(r.dtype);
  const Tensor gates = at::randn({r.tokens, r.slots}).sigmoid(), scale = at::ones({r.experts});

  const mk::Exec exec;
  const mk::RaggedExperts experts{r.experts, r.d_in,         r.d_out, kernel_dtype(r.dtype),  stacked.data_ptr(),
                                  nullptr,   offsets.data(), nullptr, scale.data_ptr<float>()};
  const Tensor route_space = bytes_for(mk::route_bytes(r.tokens, r.slots, r.experts, mk::Device::kCpu));
  const Tensor saved = bytes_for(mk::delta_saved_bytes(experts, r.tokens * r.slots, mk::Device::kCpu));
  const Tensor space = bytes_for(std::max(mk::delta_forward_workspace(experts, r.tokens, r.slots, exec),
                                          mk::delta_backward_workspace(experts, r.tokens, r.slots, exec)));
  const Tensor y = at::empty_like(y0), dx = at::empty_like(xs[0]), dgates = at::empty_like(gates),
               da = at::empty({r.experts * r.d_out, r.d_in});
  const auto ours = [&](size_t set) {
    const Tensor& x = xs[set % xs.size()];
    const mk::Route route = mk::route_build(index.data(), r.tokens, r.slots, r.experts, view(route_space), exec);
    mk::delta_forward({&experts,
                       &route,
                       gates.data_ptr(),
                       {x.data_ptr(), r.d_in},
                       {y0.data_ptr(), r.d_out},
                       {y.data_ptr(), r.d_out},
                       r.backward ? saved.data_ptr() : nullptr},
                      view(space), exec);
    if (r.backward)
      mk::delta_backward({&experts,
                          &route,
                          gates.data_ptr(),
                          {x.data_ptr(), r.d_in},
                          {dy.data_ptr(), r.d_out},
                          {},
                          saved.data_ptr(),
                          {dx.data_ptr(), r.d_in},
                          dgates.data_ptr(),
                          da.data_ptr(),
                          nullptr,
                          mk::WeightGrads::kChosenOnly},
                         view(space), exec);
    return y;
  };
  const auto loop = [&](const Inputs& in) {
    Tensor out = y0.to(in.x.scalar_type());
    for (const Segment& s : segments_of(index, r.slots, full))
      out = at::index_add(out, 0, s.tokens,
                          at::mm(at::index_select(in.x, 0, s.tokens), in.weights[static_cast<size_t>(s.expert)].t()) *
                              at::index_select(in.gates.flatten(), 0, s.pairs).unsqueeze(1).to(out.scalar_type()));
    return out;
  };
  const auto padded = [&](size_t set) {
    const at::NoGradGuard no_grad;
    const std::vector<Segment> all = segments_of(index, r.slots, full);
    int64_t most = 0;
    for (const Segment& s : all) most = std::max(most, s.tokens.numel());
    Tensor pad = at::zeros({r.experts, most, r.d_in}, y0.options());
    for (const Segment& s : all)
      pad.select(0, s.expert).narrow(0, 0, s.tokens.numel()).copy_(at::index_select(xs[set % xs.size()], 0, s.tokens));
    const Tensor products = at::bmm(pad, stacked.view({r.experts, r.d_out, r.d_in}).transpose(1, 2));
    Tensor out = y0;
    for (const Segment& s : all)
      out = at::index_add(out, 0, s.tokens,
                          products.select(0, s.expert).narrow(0, 0, s.tokens.numel()) *
                              at::index_select(gates.flatten(), 0, s.pairs).unsqueeze(1).to(out.scalar_type()));
    return out;
  };
  const auto inputs = [&](const Tensor& x, at::ScalarType dtype) {
    Inputs in{x.to(dtype), gates.to(dtype == at::kDouble ? at::kDouble : at::kFloat), {}};
    for (int64_t e = 0; e < r.experts; ++e)
      in.weights.push_back(stacked.narrow(0, offsets[static_cast<size_t>(e)], r.d_out).to(dtype));
    return in;
  };
  std::vector<Contender> all;
  all.push_back({"ours", ours, {}});
  all.push_back({"B1",
                 [&](size_t set) {
                   Inputs in = inputs(xs[set % xs.size()], r.dtype);
                   if (!r.backward) {
                     const at::NoGradGuard no_grad;
                     return loop(in);
                   }
                   const auto leaf = [](Tensor& t) { t = t.detach().set_requires_grad(true); };
                   leaf(in.x), leaf(in.gates);
                   for (Tensor& t : in.weights) leaf(t);
                   const Tensor out = loop(in);
                   out.backward(dy);
                   return out.detach();
                 },
                 {}});
  if (!r.backward) all.push_back({"B2", padded, {}});
  all.push_back({"B7",
                 [&](size_t set) {
                   const at::NoGradGuard no_grad;
                   return at::mm(xs[set % xs.size()], weight.t());
                 },
                 {}});
  time_interleaved(all, r.budget_s);
  double error = 0;
  {
    const at::NoGradGuard no_grad;
    const Tensor reference = loop(inputs(xs[0], at::kDouble));
    error = ((ours(0).to(at::kDouble) - reference).norm() / reference.norm()).item<double>();
  }
  const double passes = r.backward ? 3 : 1, element = r.dtype == at::kFloat ? 4 : 2;
  const double pairs = static_cast<double>(r.tokens * r.slots), active = static_cast<double>(segments.size());
  const double flops = 2 * pairs * static_cast<double>(r.d_in * r.d_out) * passes;
  const double bytes =
      element *
      (active * static_cast<double>(r.d_in * r.d_out) + static_cast<double>(r.tokens * (r.d_in + 2 * r.d_out))) *
      passes;
  print_cell({fmt::format("O4 {}x{} {}", r.d_in, r.d_out, r.backward ? "fwd+bwd" : "fwd"), "dense " + r.routing,
              r.tokens, r.experts, r.slots, r.dtype, flops, bytes, error},
             all, peaks);
}

void bench::run_materialise(const Request& r, const Peaks& peaks) {
  std::vector<int64_t> ranks = repeat_to(r.ranks.ranks, r.experts), offsets{0};
  for (const int64_t rank : ranks) offsets.push_back(offsets.back() + rank);
  const Tensor a = rows(offsets.back(), r.d_in, r.dtype), bt = rows(offsets.back(), r.d_out, r.dtype),
               scale = at::ones({r.experts});
  const mk::Exec exec;
  const mk::RaggedExperts experts{r.experts,     r.d_in,         r.d_out, kernel_dtype(r.dtype),  a.data_ptr(),
                                  bt.data_ptr(), offsets.data(), nullptr, scale.data_ptr<float>()};
  const Tensor space = bytes_for(mk::materialise_workspace(experts, exec)),
               out = at::empty({r.experts, r.d_out, r.d_in});
  const auto slab = [&](const Tensor& t, int64_t e) {
    return t.narrow(0, offsets[static_cast<size_t>(e)], ranks[static_cast<size_t>(e)]);
  };
  const auto product = [&](const Tensor& left, const Tensor& right) {
    const at::NoGradGuard no_grad;
    Tensor all = at::empty({r.experts, r.d_out, r.d_in}, left.options());
    for (int64_t e = 0; e < r.experts; ++e) {
      Tensor one = all.select(0, e);
      at::mm_out(one, slab(left, e).t(), slab(right, e));
    }
    return all;
  };
  std::vector<Contender> all;
  all.push_back({"ours",
                 [&](size_t) {
                   mk::materialise(experts, out.data_ptr(), view(space), exec);
                   return out;
                 },
                 {}});
  all.push_back({"B1", [&](size_t) { return product(bt, a); }, {}});
  time_interleaved(all, r.budget_s);
  const Tensor reference = product(bt.to(at::kDouble), a.to(at::kDouble));
  const double error = ((out.to(at::kDouble) - reference).norm() / reference.norm()).item<double>();
  const double d_in = static_cast<double>(r.d_in), d_out = static_cast<double>(r.d_out),
               rank = static_cast<double>(offsets.back());
  print_cell(
      {fmt::format("O4 {}x{} materialise", r.d_in, r.d_out), r.ranks.name, 0, r.experts, 0, r.dtype,
       2 * d_in * d_out * rank,
       (r.dtype == at::kFloat ? 4 : 2) * rank * (d_in + d_out) + 4 * static_cast<double>(r.experts) * d_in * d_out,
       error},
      all, peaks);
}
