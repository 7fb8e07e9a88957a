// O1, the low-rank delta of a linear map, against ATen.
#include <algorithm>
#include <cmath>
#include <functional>
#include <random>
#include <string>
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
#include <ATen/ops/mul.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>

#include "bench/ragged_bench.h"
#include "kernels/layout.h"
#include "kernels/ragged_delta.h"

using namespace bench;

namespace {

namespace mk = moraine::kernels;
using at::Tensor;

struct Case {
  int64_t tokens, experts, slots, d_in, d_out;
  std::string ranks_name, routing;
  std::vector<int64_t> ranks, offsets;
  at::ScalarType dtype;
  std::vector<int32_t> index;
  std::vector<Tensor> x;  // rotated, so that inputs come from memory
  Tensor a, bt, y0, dy, gates, scale, weight;
  int64_t total_rank() const { return offsets.back(); }
  double work() const {  // sum over pairs of the rank
    double sum = 0;
    for (const int32_t e : index) sum += static_cast<double>(ranks[static_cast<size_t>(e)]);
    return sum;
  }
  double active_rank() const {
    double sum = 0;
    for (int64_t e = 0; e < experts; ++e)
      if (std::find(index.begin(), index.end(), e) != index.end())
        sum += static_cast<double>(ranks[static_cast<size_t>(e)]);
    return sum;
  }
};

Case make_case(int64_t tokens, int64_t experts, int64_t slots, int64_t d_in, int64_t d_out, const RankSet& set,
               const std::string& routing, at::ScalarType dtype) {
  Case c{tokens, experts, slots, d_in, d_out, set.name, routing, repeat_to(set.ranks, experts), {0}, dtype, {}, {},
         {},     {},      {},    {},   {},    {},       {}};
  for (const int64_t r : c.ranks) c.offsets.push_back(c.offsets.back() + r);
  std::mt19937 engine(static_cast<unsigned>(tokens * 131 + experts));
  c.index = draw_route(routing, tokens, slots, experts, engine);
  const auto rows = [&](int64_t n, int64_t d) {
    return (at::randn({n, d}) / std::sqrt(static_cast<double>(d))).to(dtype);
  };
  const int64_t sets = std::max<int64_t>(1, std::min<int64_t>(8, (64 << 20) / (tokens * d_in * 4)));
  for (int64_t i = 0; i < sets; ++i) c.x.push_back(at::randn({tokens, d_in}).to(dtype));
  c.a = rows(c.total_rank(), d_in), c.bt = rows(c.total_rank(), d_out);
  c.y0 = at::randn({tokens, d_out}).to(dtype), c.dy = at::randn({tokens, d_out}).to(dtype);
  c.gates = at::randn({tokens, slots}).sigmoid();
  c.scale = at::zeros({experts}) + 1.0;
  c.weight = rows(d_out, d_in);
  return c;
}

// ---- ours ----------------------------------------------------------------------------------------------------------

struct Ours {
  const Case& c;
  mk::Exec exec;
  mk::RaggedExperts experts;
  Tensor route_space, saved, space, y, dx, da, dbt, dgates;

  explicit Ours(const Case& case_) : c(case_) {
    exec.check_inputs = true;
    experts = {c.experts,       c.d_in,           c.d_out, kernel_dtype(c.dtype),    c.a.data_ptr(),
               c.bt.data_ptr(), c.offsets.data(), nullptr, c.scale.data_ptr<float>()};
    route_space = bytes_for(mk::route_bytes(c.tokens, c.slots, c.experts, mk::Device::kCpu));
    saved = bytes_for(mk::delta_saved_bytes(experts, c.tokens * c.slots, mk::Device::kCpu));
    space = bytes_for(std::max(mk::delta_forward_workspace(experts, c.tokens, c.slots, exec),
                               mk::delta_backward_workspace(experts, c.tokens, c.slots, exec)));
    y = at::empty_like(c.y0), dx = at::empty_like(c.x[0]);
    da = at::empty({c.total_rank(), c.d_in}), dbt = at::empty({c.total_rank(), c.d_out}),
    dgates = at::empty_like(c.gates);
  }
  Tensor run(size_t set, bool backward) {
    const Tensor& x = c.x[set % c.x.size()];
    const mk::Route route = mk::route_build(c.index.data(), c.tokens, c.slots, c.experts, view(route_space), exec);
    mk::delta_forward({&experts,
                       &route,
                       c.gates.data_ptr(),
                       {x.data_ptr(), c.d_in},
                       {c.y0.data_ptr(), c.d_out},
                       {y.data_ptr(), c.d_out},
                       backward ? saved.data_ptr() : nullptr},
                      view(space), exec);
    if (backward)
      mk::delta_backward({&experts,
                          &route,
                          c.gates.data_ptr(),
                          {x.data_ptr(), c.d_in},
                          {c.dy.data_ptr(), c.d_out},
                          {},
                          saved.data_ptr(),
                          {dx.data_ptr(), c.d_in},
                          dgates.data_ptr(),
                          da.data_ptr(),
                          dbt.data_ptr(),
                          mk::WeightGrads::kChosenOnly},
                         view(space), exec);
    return y;
  }
};

// ---- baselines -----------------------------------------------------------------------------------------------------

std::vector<Segment> segments_of(const Case& c) { return bench::segments_of(c.index, c.slots, c.ranks); }

struct Inputs {
  Tensor x, a, bt, gates;
  std::vector<Tensor> own_a,
      own_bt;  // one tensor per expert, as a caller who loops would have: a gradient of a slice fills the whole
};
using Forward = std::function<Tensor(const Inputs&)>;

Tensor slab(const Tensor& w, const Case& c, int64_t e) {
  return w.narrow(0, c.offsets[static_cast<size_t>(e)], c.ranks[static_cast<size_t>(e)]);
}

Inputs inputs_of(const Case& c, const Tensor& x, const Tensor& a, const Tensor& bt, const Tensor& gates) {
  Inputs in{x, a, bt, gates, {}, {}};
  for (int64_t e = 0; e < c.experts; ++e) {
    in.own_a.push_back(slab(a, c, e));
    in.own_bt.push_back(slab(bt, c, e));
  }
  return in;
}

// Rebuilds the segments on every call, as a caller would after each routing decision.
Tensor loop(const Case& c, const Inputs& in) {
  Tensor y = c.y0.to(in.x.scalar_type());
  const Tensor gates = in.gates.flatten();
  for (const Segment& s : segments_of(c)) {
    const Tensor u = at::mm(at::index_select(in.x, 0, s.tokens), in.own_a[static_cast<size_t>(s.expert)].t());
    const Tensor out = at::mm(u, in.own_bt[static_cast<size_t>(s.expert)]) *
                       at::index_select(gates, 0, s.pairs).unsqueeze(1).to(y.scalar_type());
    y = at::index_add(y, 0, s.tokens, out);
  }
  return y;
}

Tensor padded(const Case& c, const Inputs& in, const Tensor& a_pad, const Tensor& bt_pad) {
  const std::vector<Segment> all = segments_of(c);
  int64_t most = 0;
  for (const Segment& s : all) most = std::max(most, s.tokens.numel());
  Tensor x_pad = at::zeros({c.experts, most, c.d_in}, in.x.options());
  for (const Segment& s : all)
    x_pad.select(0, s.expert).narrow(0, 0, s.tokens.numel()).copy_(at::index_select(in.x, 0, s.tokens));
  const Tensor out = at::bmm(at::bmm(x_pad, a_pad.transpose(1, 2)), bt_pad);
  Tensor y = c.y0;
  const Tensor gates = in.gates.flatten();
  for (const Segment& s : all)
    y = at::index_add(y, 0, s.tokens,
                      out.select(0, s.expert).narrow(0, 0, s.tokens.numel()) *
                          at::index_select(gates, 0, s.pairs).unsqueeze(1).to(y.scalar_type()));
  return y;
}

Tensor peft_like(const Case& c, const Inputs& in) {
  Tensor y = c.y0;
  const Tensor index =
      at::tensor(std::vector<int64_t>(c.index.begin(), c.index.end()), at::kLong).view({c.tokens, c.slots});
  for (int64_t e = 0; e < c.experts; ++e) {
    if (c.ranks[static_cast<size_t>(e)] == 0) continue;
    const Tensor chosen = index == e;
    const Tensor rows = at::nonzero(chosen.any(1)).flatten();
    if (rows.numel() == 0) continue;
    const Tensor weight = at::mul(in.gates, chosen).sum(1).index_select(0, rows).unsqueeze(1);
    const Tensor part = in.x.index_select(0, rows).to(at::kFloat).to(in.own_a[static_cast<size_t>(e)].scalar_type());
    const Tensor out =
        at::mm(at::mm(part, in.own_a[static_cast<size_t>(e)].t()), in.own_bt[static_cast<size_t>(e)]).to(at::kFloat) *
        weight;
    y = y.index_add(0, rows, out.to(y.scalar_type()));
  }
  return y;
}

Tensor masked_dense(const Case& c, const Inputs& in) {
  Tensor mask = at::zeros({c.tokens, c.total_rank()}, in.x.options());
  for (const Segment& s : segments_of(c))
    mask.narrow(1, c.offsets[static_cast<size_t>(s.expert)], c.ranks[static_cast<size_t>(s.expert)])
        .index_copy_(0, s.tokens,
                     in.gates.flatten()
                         .index_select(0, s.pairs)
                         .unsqueeze(1)
                         .to(mask.scalar_type())
                         .expand({-1, c.ranks[static_cast<size_t>(s.expert)]}));
  return c.y0 + at::mm(at::mm(in.x, in.a.t()) * mask, in.bt);
}

Tensor materialised(const Case& c, const Inputs& in, const std::vector<Tensor>& dense) {
  Tensor y = c.y0;
  for (const Segment& s : segments_of(c))
    y = at::index_add(y, 0, s.tokens,
                      at::mm(at::index_select(in.x, 0, s.tokens), dense[static_cast<size_t>(s.expert)].t()) *
                          at::index_select(in.gates.flatten(), 0, s.pairs).unsqueeze(1).to(y.scalar_type()));
  return y;
}

std::function<Tensor(size_t)> with_autograd(const Case& c, bool backward, Forward forward) {
  return [&c, backward, forward](size_t set) {
    Inputs in = inputs_of(c, c.x[set % c.x.size()], c.a, c.bt, c.gates);
    if (!backward) {
      const at::NoGradGuard no_grad;
      return forward(in);
    }
    const auto leaf = [](Tensor& t) { t = t.detach().set_requires_grad(true); };
    leaf(in.x), leaf(in.a), leaf(in.bt), leaf(in.gates);
    for (Tensor& t : in.own_a) leaf(t);
    for (Tensor& t : in.own_bt) leaf(t);
    const Tensor y = forward(in);
    y.backward(c.dy);
    return y.detach();
  };
}

void run_delta_case(const Case& c, bool backward, const Peaks& peaks, double budget_s, bool few) {
  Ours ours(c);
  std::vector<Contender> all;
  all.push_back({"ours", [&](size_t set) { return ours.run(set, backward); }, {}});
  all.push_back({"B1", with_autograd(c, backward, [&](const Inputs& in) { return loop(c, in); }), {}});
  Tensor a_pad, bt_pad;
  std::vector<Tensor> dense;
  const int64_t widest = *std::max_element(c.ranks.begin(), c.ranks.end());
  const double element = c.dtype == at::kFloat ? 4 : 2;
  if (!few && !backward && static_cast<double>(c.experts * widest * (c.d_in + c.d_out)) * element < 2e9) {
    a_pad = at::zeros({c.experts, widest, c.d_in}, c.a.options()),
    bt_pad = at::zeros({c.experts, widest, c.d_out}, c.bt.options());
    for (int64_t e = 0; e < c.experts; ++e) {
      a_pad.select(0, e).narrow(0, 0, c.ranks[static_cast<size_t>(e)]).copy_(slab(c.a, c, e));
      bt_pad.select(0, e).narrow(0, 0, c.ranks[static_cast<size_t>(e)]).copy_(slab(c.bt, c, e));
    }
    all.push_back({"B2", with_autograd(c, false, [&](const Inputs& in) { return padded(c, in, a_pad, bt_pad); }), {}});
  }
  all.push_back({"B3", with_autograd(c, backward, [&](const Inputs& in) { return peft_like(c, in); }), {}});
  if (!few)
    all.push_back({"B5", with_autograd(c, backward, [&](const Inputs& in) { return masked_dense(c, in); }), {}});
  if (!few && !backward && static_cast<double>(c.experts * c.d_in * c.d_out) * element < 1.2e9) {
    for (int64_t e = 0; e < c.experts; ++e) dense.push_back(at::mm(slab(c.bt, c, e).t(), slab(c.a, c, e)));
    all.push_back({"B6", with_autograd(c, false, [&](const Inputs& in) { return materialised(c, in, dense); }), {}});
  }
  all.push_back({"B7", with_autograd(c, false, [&](const Inputs& in) { return at::mm(in.x, c.weight.t()); }), {}});
  time_interleaved(all, budget_s);

  double error = 0;
  {
    const at::NoGradGuard no_grad;
    const Tensor ref = loop(
        c, inputs_of(c, c.x[0].to(at::kDouble), c.a.to(at::kDouble), c.bt.to(at::kDouble), c.gates.to(at::kDouble)));
    error = ((ours.run(0, backward).to(at::kDouble) - ref).norm() / ref.norm()).item<double>();
  }
  const double passes = backward ? 3 : 1;  // backward does each product twice
  const double flops = 2.0 * static_cast<double>(c.d_in + c.d_out) * c.work() * passes;
  const double bytes = element *
                       (static_cast<double>(c.d_in + c.d_out) * c.active_rank() +
                        static_cast<double>(c.tokens * (c.d_in + 2 * c.d_out))) *
                       passes;
  print_cell({fmt::format("O1 {}x{} {}", c.d_in, c.d_out, backward ? "fwd+bwd" : "fwd"), c.ranks_name + " " + c.routing,
              c.tokens, c.experts, c.slots, c.dtype, flops, bytes, error},
             all, peaks);
}

}  // namespace

void bench::run_delta(const Request& r, const Peaks& peaks) {
  const Case c = make_case(r.tokens, r.experts, r.slots, r.d_in, r.d_out, r.ranks, r.routing, r.dtype);
  run_delta_case(c, r.backward, peaks, r.budget_s, r.few);
}
