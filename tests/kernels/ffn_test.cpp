// Low-rank FFN experts in the factored form against the double oracle.
#include <cmath>
#include <numeric>

#include "tests/kernels/harness.h"

namespace moraine::kernels::test {
namespace {

using FfnExpert = OnTarget;

struct Case {
  Ffn experts;
  Routing routing;
  Vec x, gate_base, up_base, dy, q;
};

Case make_case(Random& random, DType dtype, int64_t tokens, int64_t slots, int64_t d, int64_t f,
               const std::vector<int64_t>& gate, const std::vector<int64_t>& up, const std::vector<int64_t>& down) {
  return {{random.experts(d, f, gate, dtype), random.experts(d, f, up, dtype), random.experts(f, d, down, dtype)},
          random.routing(tokens, slots, static_cast<int64_t>(gate.size())),
          random.normal(tokens * d, dtype),
          random.normal(tokens * f, dtype),
          random.normal(tokens * f, dtype),
          random.normal(tokens * d, dtype),
          random.normal(tokens * f, dtype)};
}

// a, b, h, dh, da and db are rounded to the storage type on the way, each at most half an ulp of relative error on top
// of the linear operation's own: allow twice its bound, and three times where two rounded factors meet in a product.
void expect_matches_oracle(const Target& target, const Case& c) {
  const FfnResult out = run_ffn(target, c.experts, c.routing, c.x, c.gate_base, c.up_base, c.dy, c.q);
  const FfnOut ref = ffn_forward(c.experts, c.routing, c.x, c.gate_base, c.up_base);
  const FfnGrads grad = ffn_backward(c.experts, c.routing, c.x, c.gate_base, c.up_base, c.dy, c.q);
  const auto loosened = [&](double by) {
    const Tolerance t = output_tolerance(target.dtype);
    return Tolerance{by * t.relative, by * t.element, 2 * by * t.rms_share};
  };
  expect_close(out.out.hidden_sum, ref.hidden_sum, loosened(2), "hidden_sum");
  expect_close(out.out.y_delta, ref.y_delta, loosened(2), "y_delta");
  expect_close(out.grads.dgate_base, grad.dgate_base, loosened(3), "dgate_base");
  expect_close(out.grads.dup_base, grad.dup_base, loosened(3), "dup_base");
  expect_close(out.grads.dx_delta, grad.dx_delta, loosened(3), "dx_delta");
  expect_close_norm(out.grads.dgates, grad.dgates, 3 * gate_tolerance(target.dtype), "dgates");
  expect_close(out.grads.gate.da, grad.gate.da, loosened(3), "dA of gate");
  expect_close(out.grads.gate.dbt, grad.gate.dbt, loosened(3), "dBt of gate");
  expect_close(out.grads.up.da, grad.up.da, loosened(3), "dA of up");
  expect_close(out.grads.up.dbt, grad.up.dbt, loosened(3), "dBt of up");
  expect_close(out.grads.down.da, grad.down.da, loosened(3), "dA of down");
  expect_close(out.grads.down.dbt, grad.down.dbt, loosened(3), "dBt of down");
}

TEST_P(FfnExpert, ForwardAndBackwardEqualTheOracle) {
  expect_matches_oracle(
      GetParam(), make_case(random, GetParam().dtype, 37, 2, 48, 136, {0, 3, 16, 9}, {0, 3, 16, 9}, {0, 3, 16, 9}));
  expect_matches_oracle(GetParam(),
                        make_case(random, GetParam().dtype, 20, 3, 24, 264, {2, 0, 5}, {0, 4, 1}, {7, 0, 1}));
  expect_matches_oracle(GetParam(), make_case(random, GetParam().dtype, 7, 1, 16, 40, {12}, {10}, {8}));
  expect_matches_oracle(GetParam(), make_case(random, GetParam().dtype, 0, 2, 16, 40, {2, 1}, {1, 3}, {8, 0}));
}

TEST_P(FfnExpert, RankZeroIsTheFrozenFfnsActivation) {
  Case c = make_case(random, GetParam().dtype, 15, 1, 16, 72, {0}, {0}, {0});
  std::fill(c.routing.index.begin(), c.routing.index.end(), 0);
  std::fill(c.routing.gates.begin(), c.routing.gates.end(), 1.0);
  const FfnResult out = run_ffn(GetParam(), c.experts, c.routing, c.x, c.gate_base, c.up_base, c.dy, c.q);
  Vec ref(c.gate_base.size());
  for (size_t i = 0; i < ref.size(); ++i) ref[i] = c.gate_base[i] / (1 + std::exp(-c.gate_base[i])) * c.up_base[i];
  expect_close(out.out.hidden_sum, ref, output_tolerance(GetParam().dtype), "hidden_sum");
  expect_same_bits(out.out.y_delta, Vec(15 * 16, 0.0), "y_delta");
}

TEST_P(FfnExpert, TwoEqualExpertsWhoseGatesSumToOneAreOneExpert) {
  const DType dtype = GetParam().dtype;
  Case two = make_case(random, dtype, 18, 2, 24, 80, {5}, {6}, {3});
  Case one = two;
  for (size_t t = 0; t < 18; ++t) {
    two.routing.index[2 * t] = two.routing.index[2 * t + 1] = one.routing.index[2 * t] = 0;
    one.routing.index[2 * t + 1] = -1;
    two.routing.gates[2 * t] = 0.25, two.routing.gates[2 * t + 1] = 0.75, one.routing.gates[2 * t] = 1;
  }
  const FfnResult a = run_ffn(GetParam(), two.experts, two.routing, two.x, two.gate_base, two.up_base, two.dy, two.q);
  const FfnResult b = run_ffn(GetParam(), one.experts, one.routing, one.x, one.gate_base, one.up_base, one.dy, one.q);
  Tolerance t = output_tolerance(dtype);
  t.relative *= 2, t.rms_share *= 2;  // both sides are rounded
  expect_close(a.out.hidden_sum, b.out.hidden_sum, t, "hidden_sum");
  expect_close(a.out.y_delta, b.out.y_delta, t, "y_delta");
  expect_close(a.grads.dx_delta, b.grads.dx_delta, t, "dx_delta");
}

TEST_P(FfnExpert, SaturatedActivationsStayFinite) {
  Case c = make_case(random, GetParam().dtype, 9, 1, 16, 40, {3}, {2}, {4});
  for (size_t i = 0; i < c.gate_base.size(); ++i) c.gate_base[i] = (i % 2 == 0 ? 120.0 : -120.0);
  expect_matches_oracle(GetParam(), c);
}

TEST(FfnGradcheck, BackwardIsTheDerivativeOfTheWholeFfn) {
  Random random;
  SCOPED_TRACE(testing::Message() << "MORAINE_TEST_SEED=" << random.seed());
  const Target target{{Device::kCpu, Path::kScalar}, DType::kF64};
  const int64_t tokens = 5, d = 6, f = 9;
  Case c = make_case(random, DType::kF64, tokens, 2, d, f, {0, 1, 3}, {0, 2, 3}, {0, 3, 1});
  const Vec wd = random.normal(d * f, DType::kF64);  // frozen down projection [d, f]; the loss is <dy, y>
  c.q.assign(static_cast<size_t>(tokens * f), 0.0);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t o = 0; o < d; ++o)
      for (int64_t i = 0; i < f; ++i)
        c.q[static_cast<size_t>(t * f + i)] +=
            wd[static_cast<size_t>(o * f + i)] * c.dy[static_cast<size_t>(t * d + o)];
  const auto run = [&] { return run_ffn(target, c.experts, c.routing, c.x, c.gate_base, c.up_base, c.dy, c.q); };
  const auto loss = [&] {
    const FfnResult r = run();  // <dy, Wd hidden + delta> = <q, hidden> + <dy, delta>
    return std::inner_product(c.q.begin(), c.q.end(), r.out.hidden_sum.begin(), 0.0) +
           std::inner_product(c.dy.begin(), c.dy.end(), r.out.y_delta.begin(), 0.0);
  };
  const FfnResult out = run();
  const auto check = [&](Vec& at, const Vec& gradient, const char* what) {
    ASSERT_EQ(at.size(), gradient.size());
    for (size_t i = 0; i < at.size(); ++i) {
      const double kept = at[i], eps = 1e-6;
      at[i] = kept + eps;
      const double above = loss();
      at[i] = kept - eps;
      const double below = loss();
      at[i] = kept;
      EXPECT_NEAR(gradient[i], (above - below) / (2 * eps), 1e-6) << what << "[" << i << "]";
    }
  };
  check(c.gate_base, out.grads.dgate_base, "dgate_base");
  check(c.up_base, out.grads.dup_base, "dup_base");
  check(c.x, out.grads.dx_delta, "dx_delta");  // the frozen products are held fixed here
  check(c.routing.gates, out.grads.dgates, "dgates");
  check(c.experts.gate.a, out.grads.gate.da, "dA of gate");
  check(c.experts.up.bt, out.grads.up.dbt, "dBt of up");
  check(c.experts.down.a, out.grads.down.da, "dA of down");
  check(c.experts.down.bt, out.grads.down.dbt, "dBt of down");
}

const auto kName = [](const testing::TestParamInfo<Target>& tested) { return target_name(tested.param); };
INSTANTIATE_TEST_SUITE_P(Targets, FfnExpert, testing::ValuesIn(all_targets()), kName);

}  // namespace
}  // namespace moraine::kernels::test
