// O3, one adapter whose ranks are selected per token, against ATen.
#include <cmath>
#include <functional>
#include <vector>

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <fmt/format.h>

#include "bench/ragged_bench.h"
#include "kernels/layout.h"
#include "kernels/rankwise.h"

using namespace bench;

namespace {

namespace mk = moraine::kernels;
using at::Tensor;

constexpr int64_t kRank = 64, kKeep = 8;

struct Inputs {
  Tensor x, a, bt;
};

}  // namespace

void bench::run_rankwise(const Request& r, const Peaks& peaks) {
  const auto rows = [&](int64_t n, int64_t d) {
    return (at::randn({n, d}) / std::sqrt(static_cast<double>(d))).to(r.dtype);
  };
  std::vector<Tensor> xs;
  for (int i = 0; i < 4; ++i) xs.push_back(at::randn({r.tokens, r.d_in}).to(r.dtype));
  const Tensor a = rows(kRank, r.d_in), bt = rows(kRank, r.d_out), weight = rows(r.d_out, r.d_in);
  const Tensor y0 = at::randn({r.tokens, r.d_out}).to(r.dtype), dy = at::randn({r.tokens, r.d_out}).to(r.dtype);

  const mk::RankwiseAdapter adapter{kRank,        r.d_in,        r.d_out, kernel_dtype(r.dtype),
                                    a.data_ptr(), bt.data_ptr(), 1.0f,    nullptr};
  const mk::Exec exec;
  const Tensor space = bytes_for(mk::rankwise_workspace(adapter, r.tokens, exec));
  Tensor u = at::empty({r.tokens, kRank}), mask = at::empty_like(u), y = at::empty_like(y0), dx = at::empty_like(xs[0]);
  Tensor da = at::empty({kRank, r.d_in}), dbt = at::empty({kRank, r.d_out});
  const auto ours = [&](size_t set) {
    const Tensor& x = xs[set % xs.size()];
    mk::rankwise_project(adapter, {x.data_ptr(), r.d_in}, r.tokens, u.data_ptr(), view(space), exec);
    mk::rankwise_select(u.data_ptr(), r.tokens, kRank, kKeep, false, kernel_dtype(r.dtype), mask.data_ptr());
    mk::rankwise_forward(
        {&adapter, r.tokens, u.data_ptr(), mask.data_ptr(), {y0.data_ptr(), r.d_out}, {y.data_ptr(), r.d_out}},
        view(space), exec);
    if (r.backward)
      mk::rankwise_backward({&adapter,
                             r.tokens,
                             u.data_ptr(),
                             mask.data_ptr(),
                             {x.data_ptr(), r.d_in},
                             {dy.data_ptr(), r.d_out},
                             {},
                             {dx.data_ptr(), r.d_in},
                             nullptr,
                             da.data_ptr(),
                             dbt.data_ptr(),
                             false},
                            view(space), exec);
    return y;
  };
  // All ranks for all tokens, masked.
  const auto masked = [&](const Inputs& in) {
    const Tensor all = at::mm(in.x, in.a.t());
    const Tensor chosen = at::zeros_like(all).scatter(1, std::get<1>(at::topk(all.detach(), kKeep, 1)), 1);
    return y0.to(all.scalar_type()) + at::mm(all * chosen, in.bt);
  };
  // Each token's own rows, gathered.
  const auto gathered = [&](const Inputs& in) {
    const Tensor all = at::mm(in.x, in.a.t());
    const Tensor chosen = std::get<1>(at::topk(all.detach(), kKeep, 1));
    const Tensor own = in.bt.index_select(0, chosen.flatten()).view({r.tokens, kKeep, r.d_out});
    return y0 + at::bmm(all.gather(1, chosen).unsqueeze(1), own).squeeze(1);
  };
  const auto with_autograd = [&](std::function<Tensor(const Inputs&)> forward) {
    return [&, forward](size_t set) {
      Inputs in{xs[set % xs.size()], a, bt};
      if (!r.backward) {
        const at::NoGradGuard no_grad;
        return forward(in);
      }
      for (Tensor* t : {&in.x, &in.a, &in.bt}) *t = t->detach().set_requires_grad(true);
      const Tensor out = forward(in);
      out.backward(dy);
      return out.detach();
    };
  };
  std::vector<Contender> all;
  all.push_back({"ours", ours, {}});
  all.push_back({"B3", with_autograd(gathered), {}});
  all.push_back({"B5", with_autograd(masked), {}});
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
    // The selection is our own: a tie within rounding would be another function.
    const Tensor x = xs[0].to(at::kDouble);
    const Tensor out = ours(0).to(at::kDouble);
    const Tensor reference =
        y0.to(at::kDouble) + at::mm(at::mm(x, a.to(at::kDouble).t()) * mask.to(at::kDouble), bt.to(at::kDouble));
    error = ((out - reference).norm() / reference.norm()).item<double>();
  }
  // Projection needs all ranks, the rest only the selected ones.
  const double tokens = static_cast<double>(r.tokens), in = static_cast<double>(r.d_in),
               out = static_cast<double>(r.d_out), element = r.dtype == at::kFloat ? 4 : 2;
  const double flops = 2 * tokens * (kRank * in + kKeep * out) + (r.backward ? 4 * tokens * kKeep * (in + out) : 0);
  const double bytes = element * (kRank * (in + out) + tokens * (in + 2 * out)) * (r.backward ? 3 : 1);
  print_cell({fmt::format("O3 {}x{} {}", r.d_in, r.d_out, r.backward ? "fwd+bwd" : "fwd"),
              fmt::format("{} of {}", kKeep, kRank), r.tokens, 1, 1, r.dtype, flops, bytes, error},
             all, peaks);
}
