// Rank-wise masks and gates against the double oracle; selection and its ties.
#include <cmath>

#include <gmock/gmock.h>

#include "core/error.h"
#include "kernels/layout.h"
#include "tests/kernels/harness.h"

namespace moraine::kernels::test {
namespace {

struct Case {
  int64_t tokens, rank, d_in, d_out;
  Vec a, bt, x, y0, dy;
};

Case make_case(Random& random, DType dtype, int64_t tokens, int64_t rank, int64_t d_in, int64_t d_out) {
  const Experts weights = random.experts(d_in, d_out, {rank}, dtype);
  return {tokens,
          rank,
          d_in,
          d_out,
          weights.a,
          weights.bt,
          random.normal(tokens * d_in, dtype),
          random.normal(tokens * d_out, dtype),
          random.normal(tokens * d_out, dtype)};
}

struct Result {
  Vec u, mask, y;
  RankwiseGrads grads;
};

Vec with_ld(const Vec& rows, int64_t tokens, int64_t from, int64_t to, double fill) {
  Vec out(static_cast<size_t>(tokens * to), fill);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < std::min(from, to); ++i)
      out[static_cast<size_t>(t * to + i)] = rows[static_cast<size_t>(t * from + i)];
  return out;
}

// mask: [T, R] or empty, then the `keep` largest u.
Result run(const Target& target, const Case& c, Vec mask, int64_t keep, double scale, bool mask_gradient = true) {
  const DType accumulate = accumulate_dtype(target.dtype);
  const size_t element = core::size_of(target.dtype), wide = core::size_of(accumulate);
  const int64_t ld = padded_rank(c.rank);
  const auto a = put(target.exec, c.a, target.dtype), bt = put(target.exec, c.bt, target.dtype);
  const auto x = put(target.exec, c.x, target.dtype), y0 = put(target.exec, c.y0, target.dtype),
             dy = put(target.exec, c.dy, target.dtype);
  Memory offsets(target.exec, 16);
  const int64_t values[2] = {0, c.rank};
  offsets.upload(values, 16);
  const RankwiseAdapter adapter{c.rank,
                                c.d_in,
                                c.d_out,
                                target.dtype,
                                a->data(),
                                bt->data(),
                                static_cast<float>(scale),
                                static_cast<const int64_t*>(offsets.data())};
  Memory workspace(target.exec, rankwise_workspace(adapter, c.tokens, target.exec));
  const Workspace space{workspace.data(), workspace.bytes()};
  const auto count = static_cast<size_t>(c.tokens * ld);
  Memory u(target.exec, count * wide), dmask(target.exec, count * wide), y(target.exec, c.y0.size() * element);
  Memory dx(target.exec, c.x.size() * element), da(target.exec, c.a.size() * wide),
      dbt(target.exec, c.bt.size() * wide);
  rankwise_project(adapter, {x->data(), c.d_in}, c.tokens, u.data(), space, target.exec);
  const Vec padded_u = get(u, c.tokens * ld, accumulate);
  if (mask.empty()) {
    const Exec cpu;
    const auto scores = put(cpu, padded_u, accumulate);
    Memory chosen(cpu, count * wide);
    rankwise_select(scores->data(), c.tokens, c.rank, keep, false, target.dtype, chosen.data());
    mask = with_ld(get(chosen, c.tokens * ld, accumulate), c.tokens, ld, c.rank, 0);
  }
  const auto dev_mask = put(target.exec, with_ld(mask, c.tokens, c.rank, ld, 0.0), accumulate);
  rankwise_forward({&adapter, c.tokens, u.data(), dev_mask->data(), {y0->data(), c.d_out}, {y.data(), c.d_out}}, space,
                   target.exec);
  rankwise_backward({&adapter,
                     c.tokens,
                     u.data(),
                     dev_mask->data(),
                     {x->data(), c.d_in},
                     {dy->data(), c.d_out},
                     {},
                     {dx.data(), c.d_in},
                     mask_gradient ? dmask.data() : nullptr,
                     da.data(),
                     dbt.data(),
                     false},
                    space, target.exec);
  return {with_ld(padded_u, c.tokens, ld, c.rank, 0),
          mask,
          get(y, c.tokens * c.d_out, target.dtype),
          {get(dx, c.tokens * c.d_in, target.dtype), get(da, c.rank * c.d_in, accumulate),
           get(dbt, c.rank * c.d_out, accumulate),
           with_ld(get(dmask, c.tokens * ld, accumulate), c.tokens, ld, c.rank, 0)}};
}

void expect_matches_oracle(const Target& target, const Case& c, const Result& out, double scale) {
  const Tolerance t = output_tolerance(target.dtype);
  expect_close(out.y, rankwise_forward(c.a, c.bt, c.tokens, c.rank, c.d_in, c.d_out, scale, c.x, out.mask, c.y0), t,
               "y");
  const RankwiseGrads ref = rankwise_backward(c.a, c.bt, c.tokens, c.rank, c.d_in, c.d_out, scale, c.x, out.mask, c.dy);
  expect_close(out.grads.dx, ref.dx, t, "dx");
  expect_close(out.grads.da, ref.da, t, "dA");
  expect_close(out.grads.dbt, ref.dbt, t, "dBt");
  expect_close_norm(out.grads.dmask, ref.dmask, gate_tolerance(target.dtype), "dmask");
}

class Rankwise : public OnTarget {};

TEST_P(Rankwise, MasksAndGateValuesEqualTheOracle) {
  for (const int64_t rank : {1, 9, 64}) {
    const Case c = make_case(random, GetParam().dtype, 33, rank, 72, 104);
    expect_matches_oracle(GetParam(), c, run(GetParam(), c, {}, (rank + 7) / 8, 0.75), 0.75);
    expect_matches_oracle(GetParam(), c, run(GetParam(), c, {}, rank - 1, 2.0), 2.0);
    expect_matches_oracle(GetParam(), c, run(GetParam(), c, random.normal(33 * rank, DType::kF32), 0, 1.0), 1.0);
  }
}

TEST_P(Rankwise, AMaskOfOnesIsPlainLora) {
  const Case c = make_case(random, GetParam().dtype, 17, 12, 40, 56);
  const Result out = run(GetParam(), c, Vec(17 * 12, 1.0), 0, 1.0);
  const Experts experts{40, 56, {12}, false, c.a, c.bt, {1.0}};
  const Routing routing{17, 1, std::vector<int32_t>(17, 0), Vec(17, 1.0)};
  const DeltaResult plain = run_delta(GetParam(), experts, routing, c.x, c.y0, c.dy);
  Tolerance t = output_tolerance(GetParam().dtype);
  expect_close(out.y, plain.y, t, "y");
  expect_close(out.grads.da, plain.grads.da, t, "dA");
  expect_close(out.grads.dbt, plain.grads.dbt, t, "dBt");
}

TEST_P(Rankwise, FewSelectedRanksWithoutMaskGradientEqualTheOracle) {
  const Tolerance t = output_tolerance(GetParam().dtype);
  for (const int64_t rank : {16, 64, 300}) {
    const Case c = make_case(random, GetParam().dtype, 70, rank, 72, 1096);
    const Result out = run(GetParam(), c, {}, rank / 8, 0.5, false);
    const RankwiseGrads ref = rankwise_backward(c.a, c.bt, c.tokens, rank, c.d_in, c.d_out, 0.5, c.x, out.mask, c.dy);
    expect_close(out.grads.dx, ref.dx, t, "dx");
    expect_close(out.grads.da, ref.da, t, "dA");
    expect_close(out.grads.dbt, ref.dbt, t, "dBt");
  }
}

// Few selected ranks take another way through the CPU's code than many; 40 tokens that select all push the whole batch
// there.
TEST_P(Rankwise, ATokensRowsDoNotDependOnHowManyRanksOthersSelect) {
  const int64_t rank = 32;
  const Case many = make_case(random, GetParam().dtype, 50, rank, 72, 1096);
  Case few = many;
  few.tokens = 10;
  few.x.resize(10 * 72), few.y0.resize(10 * 1096), few.dy.resize(10 * 1096);
  Vec mask(50 * 32, 1.0);
  for (size_t t = 0; t < 10; ++t)
    for (size_t i = 0; i < 32; ++i) mask[t * 32 + i] = (i + t) % 11 == 0 ? 0.7 : 0.0;
  const Result all = run(GetParam(), many, mask, 0, 1.5),
               some = run(GetParam(), few, Vec(mask.begin(), mask.begin() + 320), 0, 1.5);
  EXPECT_EQ(Vec(all.y.begin(), all.y.begin() + 10 * 1096), some.y);
  EXPECT_EQ(Vec(all.grads.dx.begin(), all.grads.dx.begin() + 10 * 72), some.grads.dx);
}

TEST_P(Rankwise, WeightsOfRanksNobodySelectsAreNotRead) {
  if (GetParam().exec.device == Device::kCuda) GTEST_SKIP() << "CUDA computes every rank and masks";
  const int64_t rank = 24;
  Case c = make_case(random, GetParam().dtype, 9, rank, 40, 56);
  Vec mask(9 * 24, 0.0);
  for (size_t t = 0; t < 9; ++t) mask[t * 24 + 2] = mask[t * 24 + 5] = 1.0;
  const Result clean = run(GetParam(), c, mask, 0, 1.0, false);
  for (size_t n = 0; n < 40; ++n) c.a[7 * 40 + n] = NAN;
  for (size_t n = 0; n < 56; ++n) c.bt[7 * 56 + n] = NAN;
  const Result out = run(GetParam(), c, mask, 0, 1.0, false);
  EXPECT_EQ(out.y, clean.y);
  EXPECT_EQ(out.grads.dx, clean.grads.dx);
  EXPECT_EQ(out.grads.da, clean.grads.da);
  EXPECT_EQ(out.grads.dbt, clean.grads.dbt);
}

TEST_P(Rankwise, RowsOfRanksNobodySelectsAreExactlyZero) {
  const Case c = make_case(random, GetParam().dtype, 10, 8, 16, 24);
  Vec mask(80, 1.0);
  for (size_t t = 0; t < 10; ++t) mask[t * 8 + 3] = mask[t * 8 + 7] = 0.0;
  const Result out = run(GetParam(), c, mask, 0, 1.0);
  for (const size_t i : {3u, 7u}) {
    for (size_t n = 0; n < 16; ++n) ASSERT_EQ(out.grads.da[i * 16 + n], 0.0);
    for (size_t n = 0; n < 24; ++n) ASSERT_EQ(out.grads.dbt[i * 24 + n], 0.0);
  }
}

TEST(RankwiseSelect, TiesGoToTheLowerRankAndMagnitudeIsAnOption) {
  const float score[8] = {1, 3, -4, 3, 3, 0, 0, 0};
  float mask[8];
  rankwise_select(score, 1, 5, 2, false, DType::kF32, mask);
  EXPECT_THAT(mask, testing::ElementsAre(0, 1, 0, 1, 0, 0, 0, 0));
  rankwise_select(score, 1, 5, 2, true, DType::kF32, mask);
  EXPECT_THAT(mask, testing::ElementsAre(0, 1, 1, 0, 0, 0, 0, 0));
  rankwise_select(score, 1, 5, 0, false, DType::kF32, mask);
  EXPECT_THAT(mask, testing::Each(0.0f));
  EXPECT_THROW(rankwise_select(score, 1, 5, 6, false, DType::kF32, mask), core::UserError);
  const float bad[8] = {1, NAN, 0, 0, 0, 0, 0, 0};
  EXPECT_THROW(rankwise_select(bad, 1, 5, 2, false, DType::kF32, mask), core::UserError);
}

const auto kName = [](const testing::TestParamInfo<Target>& tested) { return target_name(tested.param); };
INSTANTIATE_TEST_SUITE_P(Targets, Rankwise, testing::ValuesIn(all_targets()), kName);

}  // namespace
}  // namespace moraine::kernels::test
