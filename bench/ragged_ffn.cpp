// O2, low-rank experts of a gated FFN with the frozen products, against ATen.
#include <algorithm>
#include <cmath>
#include <functional>
#include <random>
#include <vector>

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/index_add.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>

#include "bench/ragged_bench.h"
#include "kernels/ffn_expert.h"
#include "kernels/layout.h"

using namespace bench;

namespace {

namespace mk = moraine::kernels;
using at::Tensor;

// Low-rank parts of all experts: per projection (gate, up, down) A [R, in] and B transposed [R, out].
struct Parts {
  Tensor a[3], bt[3];
};

// The same as one tensor per expert, as a caller who loops would have: a gradient of a slice fills the whole.
struct OwnParts {
  std::vector<Tensor> a[3], bt[3];
};

struct Case {
  int64_t tokens, experts, slots, d, f;
  std::vector<int64_t> ranks, offsets{0};
  at::ScalarType dtype;
  std::vector<int32_t> index;
  std::vector<Tensor> x;  // rotated, so that inputs come from memory
  Tensor gate, up, down;  // frozen: [f, d], [f, d], [d, f]
  Parts parts;
  Tensor gates, scale, dy;
};

Case make_case(const Request& r) {
  Case c{r.tokens, r.experts, r.slots, r.d_in, r.d_out, repeat_to(r.ranks.ranks, r.experts),
         {0},      r.dtype,   {},      {},     {},      {},
         {},       {},        {},      {},     {}};
  for (const int64_t rank : c.ranks) c.offsets.push_back(c.offsets.back() + rank);
  std::mt19937 engine(static_cast<unsigned>(c.tokens * 131 + c.experts));
  c.index = draw_route(r.routing, c.tokens, c.slots, c.experts, engine);
  const auto rows = [&](int64_t n, int64_t d) {
    return (at::randn({n, d}) / std::sqrt(static_cast<double>(d))).to(r.dtype);
  };
  for (int i = 0; i < 2; ++i) c.x.push_back(at::randn({c.tokens, c.d}).to(r.dtype));
  c.gate = rows(c.f, c.d), c.up = rows(c.f, c.d), c.down = rows(c.d, c.f);
  for (int i = 0; i < 3; ++i) {
    c.parts.a[i] = rows(c.offsets.back(), i < 2 ? c.d : c.f);
    c.parts.bt[i] = rows(c.offsets.back(), i < 2 ? c.f : c.d);
  }
  c.gates = at::randn({c.tokens, c.slots}).sigmoid();
  c.scale = at::ones({c.experts});
  c.dy = at::randn({c.tokens, c.d}).to(r.dtype);
  return c;
}

struct Ours {
  const Case& c;
  mk::Exec exec;
  mk::FfnExperts experts;
  Tensor route_space, space, a, b, u_gate, u_up, u_down, hidden, y_delta, dgate, dup, dx, dgates, grads[6];

  explicit Ours(const Case& case_) : c(case_) {
    const auto projection = [&](int i, int64_t in, int64_t out) {
      return mk::RaggedExperts{c.experts,
                               in,
                               out,
                               kernel_dtype(c.dtype),
                               c.parts.a[i].data_ptr(),
                               c.parts.bt[i].data_ptr(),
                               c.offsets.data(),
                               nullptr,
                               c.scale.data_ptr<float>()};
    };
    experts = {projection(0, c.d, c.f), projection(1, c.d, c.f), projection(2, c.f, c.d)};
    const auto sizes = mk::ffn_saved_sizes(experts, c.tokens * c.slots, mk::Device::kCpu);
    route_space = bytes_for(mk::route_bytes(c.tokens, c.slots, c.experts, mk::Device::kCpu));
    space = bytes_for(std::max(mk::ffn_forward_workspace(experts, c.tokens, c.slots, exec),
                               mk::ffn_backward_workspace(experts, c.tokens, c.slots, exec)));
    a = bytes_for(sizes.a), b = bytes_for(sizes.b), u_gate = bytes_for(sizes.u_gate), u_up = bytes_for(sizes.u_up),
    u_down = bytes_for(sizes.u_down);
    hidden = at::empty({c.tokens, c.f}, c.gate.options()), dgate = at::empty_like(hidden), dup = at::empty_like(hidden);
    y_delta = at::empty_like(c.x[0]), dx = at::empty_like(c.x[0]), dgates = at::empty_like(c.gates);
    for (int i = 0; i < 3; ++i) {
      grads[2 * i] = at::empty(c.parts.a[i].sizes());
      grads[2 * i + 1] = at::empty(c.parts.bt[i].sizes());
    }
  }
  mk::ConstRows rows(const Tensor& t) const { return {t.data_ptr(), t.size(1)}; }
  mk::Rows out(Tensor& t) const { return {t.data_ptr(), t.size(1)}; }
  Tensor run(size_t set, bool backward) {
    const at::NoGradGuard no_grad;
    const Tensor& x = c.x[set % c.x.size()];
    const Tensor gate_base = at::mm(x, c.gate.t()), up_base = at::mm(x, c.up.t());
    const mk::Route route = mk::route_build(c.index.data(), c.tokens, c.slots, c.experts, view(route_space), exec);
    const mk::FfnSaved saved{a.data_ptr(), b.data_ptr(), u_gate.data_ptr(), u_up.data_ptr(), u_down.data_ptr()};
    mk::ffn_forward({&experts, &route, c.gates.data_ptr(), rows(x), rows(gate_base), rows(up_base), out(hidden),
                     out(y_delta), backward ? &saved : nullptr},
                    view(space), exec);
    Tensor y = at::addmm(y_delta, hidden, c.down.t());
    if (!backward) return y;
    const Tensor q = at::mm(c.dy, c.down);
    mk::ffn_backward({&experts, &route, c.gates.data_ptr(), rows(x), rows(c.dy), rows(q), &saved, out(dgate), out(dup),
                      out(dx), dgates.data_ptr(), grads[0].data_ptr(), grads[1].data_ptr(), grads[2].data_ptr(),
                      grads[3].data_ptr(), grads[4].data_ptr(), grads[5].data_ptr(), mk::WeightGrads::kChosenOnly},
                     view(space), exec);
    dx.addmm_(dgate, c.gate).addmm_(dup, c.up);
    return y;
  }
};

struct Inputs {
  Tensor x, gate, up, down, gates;
  OwnParts parts;
};

Tensor slab(const Tensor& w, const Case& c, int64_t e) {
  return w.narrow(0, c.offsets[static_cast<size_t>(e)], c.ranks[static_cast<size_t>(e)]);
}
OwnParts own_parts(const Case& c, at::ScalarType type) {
  OwnParts out;
  for (int i = 0; i < 3; ++i)
    for (int64_t e = 0; e < c.experts; ++e) {
      out.a[i].push_back(slab(c.parts.a[i], c, e).to(type));
      out.bt[i].push_back(slab(c.parts.bt[i], c, e).to(type));
    }
  return out;
}
Tensor low_rank(const Tensor& x, const OwnParts& parts, int i, int64_t e) {
  return at::mm(at::mm(x, parts.a[i][static_cast<size_t>(e)].t()), parts.bt[i][static_cast<size_t>(e)]);
}
Tensor weight_of(const Inputs& in, const Segment& s) {
  return in.gates.flatten().index_select(0, s.pairs).unsqueeze(1).to(in.x.scalar_type());
}

// The frozen products once per token, experts one after another.
Tensor factored_loop(const Case& c, const Inputs& in) {
  const Tensor gate_base = at::mm(in.x, in.gate.t()), up_base = at::mm(in.x, in.up.t());
  Tensor hidden = at::zeros_like(gate_base), y = at::zeros_like(in.x);
  for (const Segment& s : segments_of(c.index, c.slots, c.ranks, true)) {
    const Tensor x = in.x.index_select(0, s.tokens);
    Tensor gate = gate_base.index_select(0, s.tokens), up = up_base.index_select(0, s.tokens);
    const bool low = c.ranks[static_cast<size_t>(s.expert)] > 0;
    if (low) gate = gate + low_rank(x, in.parts, 0, s.expert), up = up + low_rank(x, in.parts, 1, s.expert);
    const Tensor h = at::silu(gate) * up, w = weight_of(in, s);
    hidden = at::index_add(hidden, 0, s.tokens, h * w);
    if (low) y = at::index_add(y, 0, s.tokens, low_rank(h, in.parts, 2, s.expert) * w);
  }
  return y + at::mm(hidden, in.down.t());
}

// Every selected expert's whole FFN by itself, as adapters on each expert's copy of the base do.
Tensor whole_experts(const Case& c, const Inputs& in) {
  Tensor y = at::zeros_like(in.x);
  for (const Segment& s : segments_of(c.index, c.slots, c.ranks, true)) {
    const Tensor x = in.x.index_select(0, s.tokens);
    Tensor gate = at::mm(x, in.gate.t()), up = at::mm(x, in.up.t());
    const bool low = c.ranks[static_cast<size_t>(s.expert)] > 0;
    if (low) gate = gate + low_rank(x, in.parts, 0, s.expert), up = up + low_rank(x, in.parts, 1, s.expert);
    const Tensor h = at::silu(gate) * up;
    Tensor out = at::mm(h, in.down.t());
    if (low) out = out + low_rank(h, in.parts, 2, s.expert);
    y = at::index_add(y, 0, s.tokens, out * weight_of(in, s));
  }
  return y;
}

std::function<Tensor(size_t)> with_autograd(const Case& c, bool backward,
                                            std::function<Tensor(const Inputs&)> forward) {
  return [&c, backward, forward](size_t set) {
    Inputs in{c.x[set % c.x.size()], c.gate, c.up, c.down, c.gates, own_parts(c, c.dtype)};
    if (!backward) {
      const at::NoGradGuard no_grad;
      return forward(in);
    }
    const auto leaf = [](Tensor& t) { t = t.detach().set_requires_grad(true); };
    leaf(in.x), leaf(in.gates);
    for (auto* all : {in.parts.a, in.parts.bt})
      for (int i = 0; i < 3; ++i)
        for (Tensor& t : all[i]) leaf(t);
    const Tensor y = forward(in);
    y.backward(c.dy);
    return y.detach();
  };
}

}  // namespace

void bench::run_ffn(const Request& r, const Peaks& peaks) {
  const Case c = make_case(r);
  Ours ours(c);
  std::vector<Contender> all;
  all.push_back({"ours", [&](size_t set) { return ours.run(set, r.backward); }, {}});
  all.push_back({"B1", with_autograd(c, r.backward, [&](const Inputs& in) { return factored_loop(c, in); }), {}});
  all.push_back({"B3", with_autograd(c, r.backward, [&](const Inputs& in) { return whole_experts(c, in); }), {}});
  all.push_back({"B7",
                 with_autograd(c, r.backward,
                               [&](const Inputs& in) {
                                 return at::mm(at::silu(at::mm(in.x, in.gate.t())) * at::mm(in.x, in.up.t()),
                                               in.down.t());
                               }),
                 {}});
  time_interleaved(all, r.budget_s);

  double error = 0;
  {
    const at::NoGradGuard no_grad;
    const auto wide = [](const Tensor& t) { return t.to(at::kDouble); };
    const Inputs in{wide(c.x[0]), wide(c.gate), wide(c.up), wide(c.down), wide(c.gates), own_parts(c, at::kDouble)};
    const Tensor reference = factored_loop(c, in);
    error = ((ours.run(0, r.backward).to(at::kDouble) - reference).norm() / reference.norm()).item<double>();
  }
  double work = 0, active = 0;
  for (const int32_t e : c.index) work += static_cast<double>(c.ranks[static_cast<size_t>(e)]);
  for (int64_t e = 0; e < c.experts; ++e)
    if (std::find(c.index.begin(), c.index.end(), e) != c.index.end())
      active += static_cast<double>(c.ranks[static_cast<size_t>(e)]);
  // Backward does the frozen products once more (with respect to x only) and each low-rank product twice.
  const double frozen = r.backward ? 2 : 1, passes = r.backward ? 3 : 1, d = static_cast<double>(c.d),
               f = static_cast<double>(c.f);
  const double tokens = static_cast<double>(c.tokens), element = c.dtype == at::kFloat ? 4 : 2;
  const double flops = frozen * 6 * tokens * d * f + passes * 6 * (d + f) * work;
  const double bytes = element * (frozen * 3 * d * f + passes * (3 * (d + f) * active + tokens * (2 * d + 3 * f)));
  print_cell({fmt::format("O2 {}/{} {}", c.d, c.f, r.backward ? "fwd+bwd" : "fwd"), r.ranks.name + " " + r.routing,
              c.tokens, c.experts, c.slots, c.dtype, flops, bytes, error},
             all, peaks);
}
