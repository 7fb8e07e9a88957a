// Ragged low-rank and dense expert deltas against the double oracle, and what must hold exactly.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "kernels/materialise.h"
#include "tests/kernels/harness.h"

namespace moraine::kernels::test {
namespace {

using Delta = OnTarget;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
const std::vector<int64_t> kRanks{0, 1, 2, 3, 5, 8, 13, 16, 17, 31, 64, 100, 129, 512};

int64_t multiple_of_8(Random& random) { return 8 * (1 + random.below(33)); }  // 8 .. 264

struct Case {
  Experts experts;
  Routing routing;
  Vec x, y0, dy;
};

Case make_case(Random& random, DType dtype, int64_t tokens, int64_t slots, const std::vector<int64_t>& ranks,
               int64_t d_in, int64_t d_out, bool dense = false) {
  Case c;
  c.experts = random.experts(d_in, d_out, ranks, dtype, dense);
  c.routing = random.routing(tokens, slots, static_cast<int64_t>(ranks.size()));
  c.x = random.normal(tokens * d_in, dtype);
  c.y0 = random.normal(tokens * d_out, dtype);
  c.dy = random.normal(tokens * d_out, dtype);
  return c;
}

void expect_matches_oracle(const Target& target, const Case& c) {
  const Tolerance tolerance = output_tolerance(target.dtype);
  const DeltaResult out = run_delta(target, c.experts, c.routing, c.x, c.y0, c.dy);
  expect_close(out.y, delta_forward(c.experts, c.routing, c.x, c.y0), tolerance, "y");
  const DeltaGrads ref = delta_backward(c.experts, c.routing, c.x, c.dy, Vec(c.x.size(), 0.0));
  expect_close(out.grads.dx, ref.dx, tolerance, "dx");
  // Stored on the way: w v once, u once, w u once more (the CPU keeps all three in the accumulate type).
  const GradMagnitudes size = delta_backward_magnitudes(c.experts, c.routing, c.x, c.dy);
  const int64_t depth = c.experts.d_in + c.experts.d_out + c.routing.tokens * c.routing.slots + 8;
  const auto check = [&](const Vec& got, const Vec& expected, const Vec& stored, const Vec& summed, int roundings,
                         const char* what) {
    expect_close_terms(got, expected, stored, summed, roundings, depth, target.dtype, what);
  };
  check(out.grads.da, ref.da, size.stored.da, size.summed.da, 1, "dA");
  expect_close_norm(out.grads.da, ref.da, tolerance.relative, "dA");
  if (!c.experts.dense) {
    check(out.grads.dbt, ref.dbt, size.stored.dbt, size.summed.dbt, 2, "dBt");
    expect_close_norm(out.grads.dbt, ref.dbt, tolerance.relative, "dBt");
  }
  check(out.grads.dgates, ref.dgates, size.stored.dgates, size.summed.dgates, 1, "dgates");
  // Below 64 pairs nothing averages over gates whose ranks cancel, and the norm says no more than the bound above.
  if (c.routing.index.size() >= 64)
    expect_close_norm(out.grads.dgates, ref.dgates, gate_tolerance(target.dtype), "dgates");
}

TEST_P(Delta, ForwardAndBackwardEqualTheOracleOverRaggedShapes) {
  const std::vector<int64_t> tokens{0, 1, 2, 7, 16, 33, 257};
  for (size_t draw = 0; draw < 3 * tokens.size(); ++draw) {
    const int64_t t = tokens[draw % tokens.size()], k = random.pick<int64_t>({1, 2, 4, 8});
    std::vector<int64_t> ranks(static_cast<size_t>(random.pick<int64_t>({1, 3, 8, 64})));
    for (int64_t& r : ranks) r = random.pick(kRanks);
    const int64_t d_in = multiple_of_8(random), d_out = multiple_of_8(random);
    // The oracle is slow: keep a case below about 10^8 multiplications.
    const int64_t slots = t * k * (d_in + d_out) > 150000 ? 1 : k;
    SCOPED_TRACE(testing::Message() << "T=" << t << " k=" << slots << " E=" << ranks.size() << " d_in=" << d_in
                                    << " d_out=" << d_out);
    expect_matches_oracle(GetParam(), make_case(random, GetParam().dtype, t, slots, ranks, d_in, d_out));
    if (HasFailure()) return;
  }
}

TEST_P(Delta, AnyWidthWorksOnTheCpu) {
  if (GetParam().exec.device == Device::kCuda) GTEST_SKIP() << "CUDA needs widths that are multiples of 8 and says so";
  for (const int64_t d : {1, 3, 7, 9, 15, 17, 33, 531})
    expect_matches_oracle(GetParam(), make_case(random, GetParam().dtype, 19, 2, {1, 4, 0, 13}, d, 2 * d + 1));
}

TEST_P(Delta, WideInputsCrossTheChunksOfADotProduct) {
  expect_matches_oracle(GetParam(), make_case(random, GetParam().dtype, 21, 2, {1, 9, 16, 3}, 1096, 1032));
}

TEST_P(Delta, BackwardAccumulatesWhenAsked) {
  const Case c = make_case(random, GetParam().dtype, 33, 2, {3, 0, 17, 8}, 40, 72);
  DeltaGrads onto;
  onto.da = random.normal(static_cast<int64_t>(c.experts.a.size()), DType::kF32);
  onto.dbt = random.normal(static_cast<int64_t>(c.experts.bt.size()), DType::kF32);
  const DeltaResult out = run_delta(GetParam(), c.experts, c.routing, c.x, c.y0, c.dy, &onto);
  DeltaGrads ref = delta_backward(c.experts, c.routing, c.x, c.dy, Vec(c.x.size(), 0.0));
  for (size_t i = 0; i < ref.da.size(); ++i) ref.da[i] += onto.da[i];
  for (size_t i = 0; i < ref.dbt.size(); ++i) ref.dbt[i] += onto.dbt[i];
  expect_close(out.grads.da, ref.da, output_tolerance(GetParam().dtype), "dA");
  expect_close(out.grads.dbt, ref.dbt, output_tolerance(GetParam().dtype), "dBt");
}

TEST_P(Delta, PermutingTokensPermutesOutputsBitForBit) {
  const int64_t tokens = 37, k = 3, d_in = 72, d_out = 104;
  const Case c = make_case(random, GetParam().dtype, tokens, k, {1, 16, 0, 33, 100}, d_in, d_out);
  std::vector<size_t> order(static_cast<size_t>(tokens));
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = order.size(); i > 1; --i)
    std::swap(order[i - 1], order[static_cast<size_t>(random.below(static_cast<int64_t>(i)))]);
  const auto permuted = [&](const Vec& rows, int64_t width) {
    Vec out;
    for (const size_t t : order)
      out.insert(out.end(), rows.begin() + static_cast<int64_t>(t) * width,
                 rows.begin() + static_cast<int64_t>(t + 1) * width);
    return out;
  };
  Case p = c;
  p.x = permuted(c.x, d_in), p.y0 = permuted(c.y0, d_out), p.dy = permuted(c.dy, d_out);
  p.routing.gates = permuted(c.routing.gates, k);
  const Vec index = permuted(Vec(c.routing.index.begin(), c.routing.index.end()), k);
  for (size_t i = 0; i < index.size(); ++i) p.routing.index[i] = static_cast<int32_t>(index[i]);
  const DeltaResult a = run_delta(GetParam(), c.experts, c.routing, c.x, c.y0, c.dy);
  const DeltaResult b = run_delta(GetParam(), p.experts, p.routing, p.x, p.y0, p.dy);
  expect_same_bits(permuted(a.y, d_out), b.y, "y");
  expect_same_bits(permuted(a.grads.dx, d_in), b.grads.dx, "dx");
  expect_same_bits(permuted(a.grads.dgates, k), b.grads.dgates, "dgates");
  expect_close(b.grads.da, a.grads.da, output_tolerance(GetParam().dtype), "dA");
}

TEST_P(Delta, RelabelingExpertsLeavesOutputsBitForBit) {
  const Case c = make_case(random, GetParam().dtype, 23, 4, {5, 0, 64, 9}, 48, 56);
  Case p = c;  // expert e becomes E - 1 - e
  const int64_t last = c.experts.num() - 1;
  p.experts.a.clear(), p.experts.bt.clear();
  const auto offsets = c.experts.offsets();
  for (int64_t e = last; e >= 0; --e) {
    const auto from = static_cast<size_t>(e);
    const auto slab = [&](const Vec& w, int64_t d) {
      return Vec(w.begin() + offsets[from] * d, w.begin() + offsets[from + 1] * d);
    };
    const Vec a = slab(c.experts.a, 48), bt = slab(c.experts.bt, 56);
    p.experts.a.insert(p.experts.a.end(), a.begin(), a.end());
    p.experts.bt.insert(p.experts.bt.end(), bt.begin(), bt.end());
  }
  std::reverse(p.experts.ranks.begin(), p.experts.ranks.end());
  std::reverse(p.experts.scale.begin(), p.experts.scale.end());
  for (int32_t& e : p.routing.index)
    if (e >= 0) e = static_cast<int32_t>(last) - e;
  const DeltaResult a = run_delta(GetParam(), c.experts, c.routing, c.x, c.y0, c.dy);
  const DeltaResult b = run_delta(GetParam(), p.experts, p.routing, p.x, p.y0, p.dy);
  expect_same_bits(a.y, b.y, "y");
  expect_same_bits(a.grads.dx, b.grads.dx, "dx");
}

TEST_P(Delta, ATokenComputesTheSameBitsAloneAndInAnyBatch) {
  const int64_t tokens = 150, k = 2, d_in = 560, d_out = 136;
  const Case c = make_case(random, GetParam().dtype, tokens, k, {1, 7, 0, 40, 130}, d_in, d_out);
  const Vec whole = run_delta_forward(GetParam(), c.experts, c.routing, c.x, c.y0);
  for (const auto& [first, count] :
       std::vector<std::pair<int64_t, int64_t>>{{0, 1}, {77, 1}, {149, 1}, {3, 5}, {40, 70}}) {
    const auto part = [&](const auto& rows, int64_t width) {
      return std::decay_t<decltype(rows)>(rows.begin() + first * width, rows.begin() + (first + count) * width);
    };
    const Routing routing{count, k, part(c.routing.index, k), part(c.routing.gates, k)};
    const Vec alone = run_delta_forward(GetParam(), c.experts, routing, part(c.x, d_in), part(c.y0, d_out));
    expect_same_bits(alone, part(whole, d_out), "y from token " + std::to_string(first));
  }
}

TEST_P(Delta, NothingLeaksFromUnusedExpertsOrNeighbours) {
  Case c = make_case(random, GetParam().dtype, 29, 2, {5, 12, 3}, 64, 40);
  for (int32_t& e : c.routing.index)
    if (e == 1) e = 2;
  const DeltaResult clean = run_delta(GetParam(), c.experts, c.routing, c.x, c.y0, c.dy);
  Case poisoned = c;  // expert 1, which nobody uses and which lies between the two others
  std::fill(poisoned.experts.a.begin() + 5 * 64, poisoned.experts.a.begin() + 17 * 64, kNan);
  std::fill(poisoned.experts.bt.begin() + 5 * 40, poisoned.experts.bt.begin() + 17 * 40, kNan);
  const DeltaResult out = run_delta(GetParam(), poisoned.experts, c.routing, c.x, c.y0, c.dy);
  expect_same_bits(out.y, clean.y, "y");
  expect_same_bits(out.grads.dx, clean.grads.dx, "dx");
  expect_same_bits(out.grads.da, clean.grads.da, "dA");
  expect_same_bits(out.grads.dbt, clean.grads.dbt, "dBt");
  expect_same_bits(out.grads.dgates, clean.grads.dgates, "dgates");
  for (int64_t i = 5 * 64; i < 17 * 64; ++i) ASSERT_EQ(out.grads.da[static_cast<size_t>(i)], 0.0);
  DeltaGrads onto;
  onto.da = random.normal(20 * 64, DType::kF32), onto.dbt = random.normal(20 * 40, DType::kF32);
  const DeltaResult added = run_delta(GetParam(), poisoned.experts, c.routing, c.x, c.y0, c.dy, &onto);
  for (size_t i = 5 * 64; i < 17 * 64; ++i) ASSERT_EQ(added.grads.da[i], onto.da[i]);
  const DeltaResult chosen =
      run_delta(GetParam(), poisoned.experts, c.routing, c.x, c.y0, c.dy, &onto, WeightGrads::kChosenOnly);
  for (size_t i = 0; i < 20 * 64; ++i)
    ASSERT_EQ(chosen.grads.da[i], i / 64 >= 5 && i / 64 < 17 ? onto.da[i] : clean.grads.da[i]);
  for (size_t i = 0; i < 20 * 40; ++i)
    ASSERT_EQ(chosen.grads.dbt[i], i / 40 >= 5 && i / 40 < 17 ? onto.dbt[i] : clean.grads.dbt[i]);
}

TEST_P(Delta, WithoutRanksOrPairsYIsY0BitForBit) {
  const DType dtype = GetParam().dtype;
  Case c = make_case(random, dtype, 9, 2, {0, 0, 0}, 16, 24);
  c.y0[3] = -0.0;
  DeltaResult out = run_delta(GetParam(), c.experts, c.routing, c.x, c.y0, c.dy);
  expect_same_bits(out.y, c.y0, "all ranks 0");
  expect_same_bits(out.grads.dgates, Vec(18, 0.0), "dgates of rank 0");
  c = make_case(random, dtype, 9, 2, {4, 3}, 16, 24);
  std::fill(c.routing.index.begin(), c.routing.index.end(), -1);
  out = run_delta(GetParam(), c.experts, c.routing, c.x, c.y0, c.dy);
  expect_same_bits(out.y, c.y0, "all slots empty");
  expect_same_bits(out.grads.da, Vec(7 * 16, 0.0), "dA without pairs");
  expect_same_bits(out.grads.dx, Vec(9 * 16, 0.0), "dx without pairs");
  c = make_case(random, dtype, 9, 2, {}, 16, 24);
  expect_same_bits(run_delta(GetParam(), c.experts, c.routing, c.x, c.y0, c.dy).y, c.y0, "no experts");
  c = make_case(random, dtype, 0, 2, {4, 3}, 16, 24);
  expect_same_bits(run_delta(GetParam(), c.experts, c.routing, c.x, c.y0, c.dy).grads.da, Vec(7 * 16, 0.0),
                   "no tokens");
}

TEST_P(Delta, AZeroGateAddsNothingButStillHasAGradient) {
  Case c = make_case(random, GetParam().dtype, 12, 1, {6}, 32, 32);
  std::fill(c.routing.index.begin(), c.routing.index.end(), 0);
  std::fill(c.routing.gates.begin(), c.routing.gates.end(), 0.0);
  const DeltaResult out = run_delta(GetParam(), c.experts, c.routing, c.x, c.y0, c.dy);
  expect_same_bits(out.y, c.y0, "y");
  const DeltaGrads ref = delta_backward(c.experts, c.routing, c.x, c.dy, Vec(c.x.size(), 0.0));
  EXPECT_GT(std::abs(ref.dgates[0]), 0.0);
  expect_close_norm(out.grads.dgates, ref.dgates, gate_tolerance(GetParam().dtype), "dgates");
}

TEST_P(Delta, TheSameExpertTwiceEqualsOneSlotWithTheSumOfGates) {
  Case twice = make_case(random, GetParam().dtype, 17, 2, {11}, 40, 48);
  Case once = twice;
  for (size_t t = 0; t < 17; ++t) {
    twice.routing.index[2 * t] = twice.routing.index[2 * t + 1] = once.routing.index[2 * t] = 0;
    once.routing.index[2 * t + 1] = -1;
    once.routing.gates[2 * t] = twice.routing.gates[2 * t] + twice.routing.gates[2 * t + 1];
  }
  const DeltaResult a = run_delta(GetParam(), twice.experts, twice.routing, twice.x, twice.y0, twice.dy);
  const DeltaResult b = run_delta(GetParam(), once.experts, once.routing, once.x, once.y0, once.dy);
  expect_close(a.y, b.y, output_tolerance(GetParam().dtype), "y");
  expect_close(a.grads.da, b.grads.da, output_tolerance(GetParam().dtype), "dA");
}

TEST_P(Delta, SplittingRanksOverTwoExpertsChangesNothing) {
  Case whole = make_case(random, GetParam().dtype, 20, 2, {13}, 40, 48);
  Case split = whole;
  split.experts.ranks = {5, 8};
  split.experts.scale = {whole.experts.scale[0], whole.experts.scale[0]};
  for (size_t t = 0; t < 20; ++t) {
    whole.routing.index[2 * t] = split.routing.index[2 * t] = 0;
    whole.routing.index[2 * t + 1] = -1;
    split.routing.index[2 * t + 1] = 1;
    split.routing.gates[2 * t + 1] = split.routing.gates[2 * t];
  }
  const DeltaResult a = run_delta(GetParam(), whole.experts, whole.routing, whole.x, whole.y0, whole.dy);
  const DeltaResult b = run_delta(GetParam(), split.experts, split.routing, split.x, split.y0, split.dy);
  expect_close(b.y, a.y, output_tolerance(GetParam().dtype), "y");
  expect_close(b.grads.da, a.grads.da, output_tolerance(GetParam().dtype), "dA");
  expect_close(b.grads.dbt, a.grads.dbt, output_tolerance(GetParam().dtype), "dBt");
}

TEST_P(Delta, ZeroBGivesY0AndNoGradientOfA) {
  Case c = make_case(random, GetParam().dtype, 20, 2, {4, 9}, 40, 48);
  std::fill(c.experts.bt.begin(), c.experts.bt.end(), 0.0);
  const DeltaResult out = run_delta(GetParam(), c.experts, c.routing, c.x, c.y0, c.dy);
  expect_close(out.y, c.y0, {0, 0, 0}, "y");
  expect_close(out.grads.da, Vec(c.experts.a.size(), 0.0), {0, 0, 0}, "dA");
}

TEST_P(Delta, DenseExpertsEqualTheOracle) {
  expect_matches_oracle(GetParam(), make_case(random, GetParam().dtype, 33, 2, {48, 0, 48}, 72, 48, true));
}

TEST_P(Delta, SkewedRoutesEqualTheOracle) {
  const std::vector<int64_t> ranks{1, 2, 4, 8, 16, 32, 64, 128};
  Case all_to_one = make_case(random, GetParam().dtype, 200, 2, ranks, 16, 24);
  std::fill(all_to_one.routing.index.begin(), all_to_one.routing.index.end(), 5);
  expect_matches_oracle(GetParam(), all_to_one);
  Case one_each = make_case(random, GetParam().dtype, 8, 1, ranks, 16, 24);
  std::iota(one_each.routing.index.begin(), one_each.routing.index.end(), 0);
  expect_matches_oracle(GetParam(), one_each);
  std::vector<int64_t> ladder;
  for (int64_t r = 1; r <= 16384; r *= 2) ladder.push_back(r);
  expect_matches_oracle(GetParam(), make_case(random, GetParam().dtype, 16, 2, ladder, 64, 64));
}

TEST_P(Delta, AHundredThousandZipfPairsEqualTheOracle) {
  const int64_t tokens =
      GetParam().exec.path == Path::kScalar || GetParam().exec.device == Device::kCuda ? 5000 : 50000;
  Case c = make_case(random, GetParam().dtype, tokens, 2, std::vector<int64_t>{1, 2, 0, 8, 3, 1, 1, 2}, 8, 16);
  Vec mass(8);
  for (size_t e = 0; e < 8; ++e) mass[e] = 1 / std::pow(static_cast<double>(e + 1), 1.2);
  std::mt19937_64 engine(random.seed());
  std::discrete_distribution<int32_t> zipf(mass.begin(), mass.end());
  for (int32_t& e : c.routing.index) e = zipf(engine);
  // Long sums over pairs: the float error grows with their square root, sqrt(1e5 / 257) over the table's bound.
  const DeltaResult out = run_delta(GetParam(), c.experts, c.routing, c.x, c.y0, c.dy);
  Tolerance tolerance = output_tolerance(GetParam().dtype);
  expect_close(out.y, delta_forward(c.experts, c.routing, c.x, c.y0), tolerance, "y");
  tolerance.relative *= 20, tolerance.rms_share *= 20;
  expect_close(out.grads.da, delta_backward(c.experts, c.routing, c.x, c.dy, Vec(c.x.size(), 0.0)).da, tolerance, "dA");
}

TEST_P(Delta, AHundredRunsGiveTheSameBits) {
  const Case c = make_case(random, GetParam().dtype, 40, 2, {3, 0, 17, 8}, 96, 72);
  const int runs = GetParam().exec.path == Path::kAvx2 ? 100 : 10;
  const DeltaResult first = run_delta(GetParam(), c.experts, c.routing, c.x, c.y0, c.dy);
  for (int i = 1; i < runs; ++i) {
    const DeltaResult again = run_delta(GetParam(), c.experts, c.routing, c.x, c.y0, c.dy);
    expect_same_bits(again.y, first.y, "y");
    expect_same_bits(again.grads.dx, first.grads.dx, "dx");
    expect_same_bits(again.grads.da, first.grads.da, "dA");
    expect_same_bits(again.grads.dbt, first.grads.dbt, "dBt");
    expect_same_bits(again.grads.dgates, first.grads.dgates, "dgates");
  }
}

// Central differences of sum(y * dy) in double: independent of every formula in the oracle.
TEST(DeltaGradcheck, BackwardIsTheDerivativeOfForward) {
  Random random;
  SCOPED_TRACE(testing::Message() << "MORAINE_TEST_SEED=" << random.seed());
  const Target target{{Device::kCpu, Path::kScalar}, DType::kF64};
  Case c = make_case(random, DType::kF64, 5, 2, {0, 1, 3}, 6, 7);
  const auto loss = [&] {
    const Vec y = run_delta_forward(target, c.experts, c.routing, c.x, c.y0);
    return std::inner_product(y.begin(), y.end(), c.dy.begin(), 0.0);
  };
  const DeltaResult out = run_delta(target, c.experts, c.routing, c.x, c.y0, c.dy);
  const auto check = [&](Vec& at, const Vec& gradient, const char* what) {
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
  check(c.x, out.grads.dx, "dx");
  check(c.experts.a, out.grads.da, "dA");
  check(c.experts.bt, out.grads.dbt, "dBt");
  check(c.routing.gates, out.grads.dgates, "dgates");
}

class Materialise : public OnTarget {};

TEST_P(Materialise, AMaterialisedExpertEqualsItsFactorsForwardAndBackward) {
  const Target target = GetParam();
  if (target.exec.device == Device::kCuda) GTEST_SKIP() << "CPU only";
  const Experts x = random.experts(24, 40, {3, 0, 24, 30}, target.dtype);
  const DeviceExperts device(target, x);
  const DType accumulate = accumulate_dtype(target.dtype);
  Memory weights(target.exec, 4 * 40 * 24 * core::size_of(accumulate));
  Memory workspace(target.exec, materialise_workspace(device.view, target.exec));
  materialise(device.view, weights.data(), {workspace.data(), workspace.bytes()}, target.exec);
  const auto offsets = x.offsets();
  const Vec dw = random.normal(4 * 40 * 24, target.dtype);
  Vec ref(4 * 40 * 24, 0.0), ref_da(x.a.size(), 0.0), ref_dbt(x.bt.size(), 0.0);
  for (size_t e = 0; e < 4; ++e)
    for (int64_t i = offsets[e]; i < offsets[e + 1]; ++i)
      for (int64_t o = 0; o < 40; ++o)
        for (int64_t c = 0; c < 24; ++c) {
          const auto w = e * 960 + static_cast<size_t>(o * 24 + c), a = static_cast<size_t>(i * 24 + c),
                     b = static_cast<size_t>(i * 40 + o);
          ref[w] += x.bt[b] * x.a[a];
          ref_da[a] += x.bt[b] * dw[w];
          ref_dbt[b] += x.a[a] * dw[w];
        }
  expect_close(get(weights, 4 * 40 * 24, accumulate), ref, output_tolerance(accumulate), "W");
  if (target.dtype != accumulate) return;  // backward is for full-precision factors
  const auto dev_dw = put(target.exec, dw, target.dtype);
  Memory da(target.exec, x.a.size() * core::size_of(accumulate)),
      dbt(target.exec, x.bt.size() * core::size_of(accumulate));
  materialise_backward(device.view, dev_dw->data(), da.data(), dbt.data(), {workspace.data(), workspace.bytes()},
                       target.exec);
  expect_close(get(da, static_cast<int64_t>(x.a.size()), accumulate), ref_da, output_tolerance(accumulate), "dA");
  expect_close(get(dbt, static_cast<int64_t>(x.bt.size()), accumulate), ref_dbt, output_tolerance(accumulate), "dBt");
}

const auto kName = [](const testing::TestParamInfo<Target>& info) { return target_name(info.param); };
INSTANTIATE_TEST_SUITE_P(Targets, Delta, testing::ValuesIn(all_targets()), kName);
INSTANTIATE_TEST_SUITE_P(Targets, Materialise, testing::ValuesIn(all_targets()), kName);

}  // namespace
}  // namespace moraine::kernels::test
