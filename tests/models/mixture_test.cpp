#include "models/mixture.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/stack.h>

#include "core/error.h"
#include "tests/models/random_tensors.h"

namespace moraine::models {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

constexpr int64_t kWidth = 6, kInner = 10, kTokens = 17;

struct World {
  SlotBase base;
  at::Tensor router, bias;  // [E, d], [E - 1]
  std::vector<FfnExpert> experts;
  at::Tensor x;  // [17, d]
};

LowRank random_pair(int64_t out, int64_t in, int64_t rank, uint64_t seed) {
  return {random_tensor({rank, in}, seed, 0.5), random_tensor({out, rank}, seed + 1, 0.5)};
}

/// A public FFN with experts of these ranks (0 = full-size), everything float64.
World make_world(const std::vector<int64_t>& ranks) {
  World w;
  w.base.gate = random_tensor({kInner, kWidth}, 1, 0.5);
  w.base.up = random_tensor({kInner, kWidth}, 2, 0.5);
  w.base.down = random_tensor({kWidth, kInner}, 3, 0.5);
  const auto experts = static_cast<int64_t>(ranks.size()) + 1;
  w.router = random_tensor({experts, kWidth}, 4);
  w.bias = random_tensor({experts - 1}, 5);
  for (size_t i = 0; i < ranks.size(); ++i) {
    FfnExpert& e = w.experts.emplace_back();
    const uint64_t seed = 100 * (i + 1);
    if (ranks[i] == 0) {
      e.gate = random_tensor({kInner, kWidth}, seed, 0.5), e.up = random_tensor({kInner, kWidth}, seed + 1, 0.5),
      e.down = random_tensor({kWidth, kInner}, seed + 2, 0.5);
    } else {
      e.gate_delta = random_pair(kInner, kWidth, ranks[i], seed);
      e.up_delta = random_pair(kInner, kWidth, ranks[i], seed + 10);
      e.down_delta = random_pair(kWidth, kInner, ranks[i], seed + 20);
    }
  }
  w.x = random_tensor({kTokens, kWidth}, 6);
  return w;
}

MixtureFfn make_mixture(const World& w, int64_t top_k, MixtureForward forward = MixtureForward::kFactored,
                        bool renormalise = false) {
  return MixtureFfn({w.router}, w.bias, w.experts, {top_k, renormalise, forward});
}

MixtureFfn make_reference(const World& w, int64_t top_k) {
  return MixtureFfn({w.router}, w.bias, w.experts,
                    {top_k, false, MixtureForward::kFactored, MixtureKernels::kReference});
}

FfnExpert densified(const FfnExpert& e, const SlotBase& base) {
  if (e.full()) return e;
  FfnExpert full;
  full.gate = base.gate + e.gate_delta.b.matmul(e.gate_delta.a);
  full.up = base.up + e.up_delta.b.matmul(e.up_delta.a);
  full.down = base.down + e.down_delta.b.matmul(e.down_delta.a);
  return full;
}

// ---- The oracle: plain loops over float64 numbers, one token and one dense expert at a time.

double at2(const at::Tensor& t, int64_t i, int64_t j) { return t.const_data_ptr<double>()[i * t.size(1) + j]; }

double row_dot(const at::Tensor& weight, int64_t row, const std::vector<double>& x) {
  double sum = 0;
  for (size_t j = 0; j < x.size(); ++j) sum += at2(weight, row, static_cast<int64_t>(j)) * x[j];
  return sum;
}

std::vector<double> loop_ffn(const FfnExpert& e, const std::vector<double>& x) {
  std::vector<double> hidden(kInner), y(kWidth);
  for (int64_t i = 0; i < kInner; ++i) {
    const double g = row_dot(e.gate, i, x);
    hidden[i] = g / (1 + std::exp(-g)) * row_dot(e.up, i, x);
  }
  for (int64_t i = 0; i < kWidth; ++i) y[i] = row_dot(e.down, i, hidden);
  return y;
}

at::Tensor loop_mixture(const World& w, int64_t top_k, bool renormalise) {
  std::vector<FfnExpert> dense = {{w.base.gate, w.base.up, w.base.down, {}, {}, {}}};
  for (const FfnExpert& e : w.experts) dense.push_back(densified(e, w.base));
  at::Tensor out = at::full({kTokens, kWidth}, 0.0, at::kDouble);
  for (int64_t t = 0; t < kTokens; ++t) {
    std::vector<double> x(kWidth), p(dense.size());
    for (int64_t j = 0; j < kWidth; ++j) x[j] = at2(w.x, t, j);
    for (size_t e = 0; e < dense.size(); ++e) {
      const double bias = e == 0 || !w.bias.defined() ? 0.0 : w.bias.const_data_ptr<double>()[e - 1];
      p[e] = std::exp(row_dot(w.router, static_cast<int64_t>(e), x) + std::min(bias, 0.0));
    }
    const double total = std::accumulate(p.begin(), p.end(), 0.0);
    std::vector<size_t> order(p.size());
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return p[a] > p[b]; });
    double chosen = 0;
    for (int64_t k = 0; k < top_k; ++k) chosen += p[order[k]];
    for (int64_t k = 0; k < top_k; ++k) {
      const double weight = p[order[k]] / (renormalise ? chosen : total);
      const std::vector<double> y = loop_ffn(dense[order[k]], x);
      for (int64_t j = 0; j < kWidth; ++j) out.mutable_data_ptr<double>()[t * kWidth + j] += weight * y[j];
    }
  }
  return out;
}

const std::vector<std::pair<MixtureForward, MixtureKernels>> kForms = {
    {MixtureForward::kFactored, MixtureKernels::kAuto},
    {MixtureForward::kFactored, MixtureKernels::kReference},
    {MixtureForward::kPerExpert, MixtureKernels::kReference}};
const std::vector<std::vector<int64_t>> kWorlds = {{2, 0, 1, 5}, {3, 4}, {0, 0, 0}, {2}, {0}};

TEST(MixtureFfn, AllFormsEqualPlainLoopsOverDenseExperts) {
  for (const auto& ranks : kWorlds) {
    const World w = make_world(ranks);
    for (int64_t top_k = 1; top_k <= static_cast<int64_t>(ranks.size()) + 1; ++top_k) {
      for (const bool renormalise : {false, true}) {
        const at::Tensor expected = loop_mixture(w, top_k, renormalise);
        for (const auto& [form, kernels] : kForms) {
          MixtureFfn mixture({w.router}, w.bias, w.experts, {top_k, renormalise, form, kernels});
          EXPECT_LE(relative_error(mixture.forward(w.x, w.base), expected),
                    1e-12)  // float64, sums of some hundred terms
              << ranks.size() + 1 << " experts, top_k " << top_k;
        }
      }
    }
  }
}

// FlexMoRE, check 9, in the precision that is used.
TEST(MixtureFfn, FactoredEqualsPerExpertEqualsDensifiedInFloat32) {
  World w = make_world({2, 0, 1, 5});
  World dense = w;
  for (FfnExpert& e : dense.experts) e = densified(e, w.base);
  const SlotBase base = {{}, {}, w.base.gate.to(at::kFloat), w.base.up.to(at::kFloat), w.base.down.to(at::kFloat), {},
                         {}, {}};
  const at::Tensor x = w.x.to(at::kFloat);
  for (const int64_t top_k : {1, 2, 5}) {
    const at::Tensor factored = make_mixture(w, top_k).forward(x, base);  // float64 masters are cast at use
    EXPECT_EQ(factored.scalar_type(), at::kFloat);
    EXPECT_LE(relative_error(factored, make_mixture(w, top_k, MixtureForward::kPerExpert).forward(x, base)), 1e-5);
    EXPECT_LE(relative_error(factored, make_mixture(dense, top_k).forward(x, base)), 1e-5);
  }
}

TEST(MixtureFfn, SecondRunHasTheSameBits) {
  const World w = make_world({2, 0, 1, 5});
  const at::Tensor x = random_tensor({500, kWidth}, 8).to(at::kFloat);
  const SlotBase base = {{}, {}, w.base.gate.to(at::kFloat), w.base.up.to(at::kFloat), w.base.down.to(at::kFloat), {},
                         {}, {}};
  for (const int64_t top_k : {2, 5}) {
    MixtureFfn mixture = make_mixture(w, top_k);
    EXPECT_TRUE(same_bits(mixture.forward(x, base), mixture.forward(x, base)));
  }
}

TEST(MixtureFfn, KeepsLeadingDimensions) {
  const World w = make_world({2});
  MixtureFfn mixture = make_mixture(w, 2);
  const at::Tensor x = random_tensor({2, 3, kWidth}, 9);
  const at::Tensor y = mixture.forward(x, w.base);
  EXPECT_EQ(y.sizes(), x.sizes());
  EXPECT_LE(relative_error(y.view({6, kWidth}), mixture.forward(x.view({6, kWidth}), w.base)), 1e-14);
}

// FlexMoRE, check 11.
TEST(MixtureFfn, OrderOfExpertsDoesNotMatterWhenAllAreActive) {
  const World w = make_world({2, 0, 1, 5});
  World permuted = w;
  const std::vector<int64_t> order = {2, 0, 3, 1};
  std::vector<at::Tensor> rows = {w.router[0]}, bias;
  for (size_t i = 0; i < order.size(); ++i) {
    permuted.experts[i] = w.experts[order[i]];
    rows.push_back(w.router[order[i] + 1]);
    bias.push_back(w.bias[order[i]]);
  }
  permuted.router = at::stack(rows), permuted.bias = at::stack(bias);
  EXPECT_LE(relative_error(make_mixture(permuted, 5).forward(w.x, w.base), make_mixture(w, 5).forward(w.x, w.base)),
            1e-13);
}

// FlexMoRE, check 10 (to rounding: the router's product has another shape). NaN shows that nothing of the expert is
// touched.
TEST(MixtureFfn, DroppingAnExpertEqualsMaskingItsLogit) {
  World w = make_world({2, 0, 1});
  World masked = w;
  masked.bias = w.bias.clone();
  masked.bias[1] = -std::numeric_limits<double>::infinity();
  masked.experts[1].gate = at::full({kInner, kWidth}, std::nan(""), at::kDouble);
  w.experts.erase(w.experts.begin() + 1);
  w.router = at::cat({w.router.slice(0, 0, 2), w.router.slice(0, 3)});
  w.bias = at::cat({w.bias.slice(0, 0, 1), w.bias.slice(0, 2)});
  for (const int64_t top_k : {1, 2, 3}) {
    EXPECT_LE(
        relative_error(make_mixture(masked, top_k).forward(w.x, w.base), make_mixture(w, top_k).forward(w.x, w.base)),
        1e-13);
  }
}

// FlexMoRE, checks 6 and 7.
TEST(MixtureFfn, ExpertsWithoutACorrectionAreThePublicOne) {
  World w = make_world({3, 2});
  for (FfnExpert& e : w.experts) {
    for (LowRank* delta : {&e.gate_delta, &e.up_delta, &e.down_delta}) delta->b.fill_(0);
  }
  EXPECT_LE(relative_error(make_mixture(w, 3).forward(w.x, w.base), w.base.forward(w.x)), 1e-14);
}

TEST(MixtureFfn, TopKIsARunTimeSwitch) {
  const World w = make_world({2, 0, 1, 5});
  MixtureFfn mixture = make_mixture(w, 5);
  mixture.set_top_k(2);
  EXPECT_TRUE(same_bits(mixture.forward(w.x, w.base), make_mixture(w, 2).forward(w.x, w.base)));
  for (const int64_t bad : {0, -1, 6}) {
    EXPECT_THAT(thrown<core::UserError>([&] { mixture.set_top_k(bad); }), HasSubstr("1..5"));
  }
}

TEST(MixtureFfn, LoadCountsMassAndSelections) {
  const World w = make_world({2, 0, 1});
  MixtureFfn mixture = make_mixture(w, 2);
  mixture.record_load(true);
  mixture.forward(w.x, w.base);
  mixture.forward(w.x, w.base);
  const MixtureFfn::Load& load = mixture.load();
  EXPECT_EQ(load.tokens, 2 * kTokens);
  EXPECT_EQ(std::accumulate(load.selected.begin(), load.selected.end(), int64_t{0}), 2 * 2 * kTokens);
  EXPECT_NEAR(std::accumulate(load.probability.begin(), load.probability.end(), 0.0), 2.0 * kTokens, 1e-10);
  mixture.record_load(true);
  EXPECT_EQ(mixture.load().tokens, 0);
  mixture.set_top_k(4);
  mixture.forward(w.x, w.base);
  EXPECT_THAT(mixture.load().selected, ElementsAre(kTokens, kTokens, kTokens, kTokens));
}

// ---- Gradients.

/// Every tensor of a world that may be trained, as leaves.
std::vector<at::Tensor> make_leaves(World& w) {
  std::vector<at::Tensor*> all = {&w.x, &w.router, &w.bias, &w.base.gate, &w.base.up, &w.base.down};
  for (FfnExpert& e : w.experts) {
    if (e.full()) {
      all.insert(all.end(), {&e.gate, &e.up, &e.down});
    } else {
      for (LowRank* delta : {&e.gate_delta, &e.up_delta, &e.down_delta}) all.insert(all.end(), {&delta->a, &delta->b});
    }
  }
  std::vector<at::Tensor> leaves;
  for (at::Tensor* tensor : all) leaves.push_back(tensor->set_requires_grad(true));
  return leaves;
}

TEST(MixtureFfn, GradientsEqualFiniteDifferences) {
  for (const auto& [form, kernels] : kForms) {
    for (const auto& [top_k, renormalise] : {std::pair<int64_t, bool>{4, false}, {2, false}, {2, true}}) {
      World w = make_world({2, 0, 3});
      const std::vector<at::Tensor> leaves = make_leaves(w);
      const at::Tensor direction = random_tensor({kTokens, kWidth}, 10);
      const auto value = [&] {
        MixtureFfn mixture({w.router}, w.bias, w.experts, {top_k, renormalise, form, kernels});
        return (mixture.forward(w.x, w.base) * direction).sum();
      };
      value().backward();
      for (size_t i = 0; i < leaves.size(); ++i) {
        double* numbers = leaves[i].detach().mutable_data_ptr<double>();
        for (int64_t j = 0; j < leaves[i].numel(); j += 1 + leaves[i].numel() / 5) {
          constexpr double kStep = 1e-6;  // error: step^2 from curvature, 1e-16 / step from rounding
          const double saved = numbers[j];
          numbers[j] = saved + kStep;
          const double above = value().item<double>();
          numbers[j] = saved - kStep;
          const double below = value().item<double>();
          numbers[j] = saved;
          const double gradient = leaves[i].grad().flatten()[j].item<double>();
          EXPECT_NEAR(gradient, (above - below) / (2 * kStep), 1e-7 * std::max(1.0, std::abs(gradient)))
              << "leaf " << i << "[" << j << "], top_k " << top_k;
        }
      }
    }
  }
}

World in_dtype(const World& w, at::ScalarType activations, at::ScalarType trained) {
  World out = w;
  const auto cast = [](at::Tensor& tensor, at::ScalarType type) {
    tensor = tensor.detach().to(type, false, /*copy=*/true);
  };
  for (at::Tensor* tensor : {&out.x, &out.base.gate, &out.base.up, &out.base.down}) cast(*tensor, activations);
  cast(out.router, trained), cast(out.bias, trained);
  for (FfnExpert& e : out.experts) {
    if (e.full()) {
      for (at::Tensor* tensor : {&e.gate, &e.up, &e.down}) cast(*tensor, trained);
    } else {
      for (LowRank* delta : {&e.gate_delta, &e.up_delta, &e.down_delta})
        cast(delta->a, trained), cast(delta->b, trained);
    }
  }
  return out;
}

double norm_error(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor x = a.detach().to(at::kDouble), y = b.detach().to(at::kDouble);
  return (x - y).norm().item<double>() / std::max(1e-30, y.norm().item<double>());
}

// Output and gradients of x, router, bias, base and every A and B: kernels against ATen in float64, in float32 and in
// bfloat16 with float32 masters. Everything is first rounded to the tested type, so that only the computation differs.
TEST(MixtureFfn, KernelsEqualTheReferenceInForwardAndTraining) {
  // float32: sums of some hundred terms, 2^-24 each. bfloat16: ATen and the kernels round x A^T, a, b, h and their
  // gradients to 2^-8 in different places, up to six times in a row; 4 x 2^-8 of the norm. float64: as float32 with
  // 2^-53.
  const struct {
    at::ScalarType activations, trained;
    double tolerance;
  } kCases[] = {{at::kDouble, at::kDouble, 1e-13}, {at::kFloat, at::kFloat, 3e-6}, {at::kBFloat16, at::kFloat, 1.6e-2}};
  for (const auto& c : kCases) {
    for (const int64_t top_k : {1, 2, 4}) {
      World rounded = in_dtype(make_world({2, 0, 1, 5}), c.activations, c.activations);
      // A router tie or a flip of the choice by rounding would compare different functions: route in one precision.
      World world[2] = {in_dtype(rounded, c.activations, c.trained), in_dtype(rounded, at::kDouble, at::kDouble)};
      if (c.activations == at::kBFloat16) world[1] = in_dtype(rounded, c.activations, c.trained);
      World& w = world[0];
      World& reference = world[1];
      const std::vector<at::Tensor> leaves = make_leaves(w), expected = make_leaves(reference);
      const at::Tensor dy = random_tensor({kTokens, kWidth}, 10).to(c.activations);
      const at::Tensor y = make_mixture(w, top_k).forward(w.x, w.base),
                       y_ref = make_reference(reference, top_k).forward(reference.x, reference.base);
      EXPECT_LE(norm_error(y, y_ref), c.tolerance) << "y, top_k " << top_k;
      y.backward(dy);
      y_ref.backward(dy.to(y_ref.scalar_type()));
      for (size_t i = 0; i < leaves.size(); ++i) {
        ASSERT_EQ(leaves[i].grad().defined(), expected[i].grad().defined()) << "leaf " << i;
        if (!leaves[i].grad().defined()) continue;
        EXPECT_EQ(leaves[i].grad().scalar_type(), leaves[i].scalar_type());
        EXPECT_LE(norm_error(leaves[i].grad(), expected[i].grad()), c.tolerance) << "leaf " << i << ", top_k " << top_k;
      }
      const at::NoGradGuard no_grad;  // inference saves nothing and must not round differently
      EXPECT_TRUE(same_bits(make_mixture(w, top_k).forward(w.x, w.base), y)) << "top_k " << top_k;
    }
  }
}

TEST(MixtureFfn, KernelsRefuseGatesThatAreNotFinite) {
  World w = make_world({2, 3});
  w.x[1][0] = std::nan("");
  EXPECT_THAT(thrown<core::NumericError>([&] { make_mixture(w, 2).forward(w.x, w.base); }),
              HasSubstr("gate of token 1"));
}

TEST(MixtureFfn, PositiveBiasIsClampedAndGetsNoGradient) {
  World w = make_world({2, 0, 1});
  w.bias = at::stack({at::full({}, 0.7, at::kDouble), at::full({}, 0.0, at::kDouble), at::full({}, -0.3, at::kDouble)})
               .set_requires_grad(true);
  const at::Tensor y = make_mixture(w, 4).forward(w.x, w.base);
  (y * random_tensor({kTokens, kWidth}, 10)).sum().backward();
  EXPECT_EQ(w.bias.grad()[0].item<double>(), 0.0);
  EXPECT_NE(w.bias.grad()[1].item<double>(), 0.0);  // at zero the bias must be able to fall
  EXPECT_NE(w.bias.grad()[2].item<double>(), 0.0);
  w.bias = at::stack({at::full({}, 0.0, at::kDouble), at::full({}, 0.0, at::kDouble), at::full({}, -0.3, at::kDouble)});
  EXPECT_LE(relative_error(make_mixture(w, 4).forward(w.x, w.base), y), 1e-14);
}

TEST(MixtureFfn, OnlyTrainedBlocksGetGradientsAndAreParameters) {
  World w = make_world({2});
  const at::Tensor frozen = w.router.slice(0, 0, 1).clone(),
                   trained = w.router.slice(0, 1).clone().to(at::kFloat).set_requires_grad(true);
  w.experts[0].up_delta.b.set_requires_grad(true);
  MixtureFfn mixture({frozen, trained}, at::Tensor(), w.experts, {2, false, MixtureForward::kFactored});
  const NamedTensors parameters = mixture.parameters();
  ASSERT_EQ(parameters.size(), 2u);
  EXPECT_EQ(parameters[0].first, "experts.1.up_proj_b.weight");
  EXPECT_EQ(parameters[1].first, "router.1");
  mixture.forward(w.x, w.base).sum().backward();
  EXPECT_EQ(trained.grad().scalar_type(), at::kFloat);  // a float32 master inside a float64 mixture
  EXPECT_TRUE(w.experts[0].up_delta.b.grad().defined());
  EXPECT_FALSE(frozen.grad().defined());
  EXPECT_FALSE(w.base.gate.grad().defined());
  EXPECT_FALSE(w.experts[0].up_delta.a.grad().defined());
}

TEST(MixtureFfn, RouterBlocksAreOneRouter) {
  const World w = make_world({2, 0, 1});
  MixtureFfn blocks({w.router.slice(0, 0, 1), w.router.slice(0, 1, 3), w.router.slice(0, 3)}, w.bias, w.experts,
                    {2, false, MixtureForward::kFactored});
  EXPECT_TRUE(same_bits(blocks.forward(w.x, w.base), make_mixture(w, 2).forward(w.x, w.base)));
}

// ---- Bad input.

TEST(MixtureFfn, RefusesPartsThatDoNotFit) {
  World w = make_world({2, 0});
  EXPECT_THAT(thrown<core::UserError>([&] {
                MixtureFfn({w.router.slice(0, 0, 2)}, {}, w.experts, {1, false, MixtureForward::kFactored});
              }),
              HasSubstr("router rows"));
  EXPECT_THAT(thrown<core::UserError>([&] { make_mixture(w, 4); }), HasSubstr("top_k"));
  w.experts[1].up = random_tensor({kInner, kWidth + 1}, 1);
  EXPECT_THAT(thrown<core::UserError>([&] { make_mixture(w, 2).forward(w.x, w.base); }), HasSubstr("expert 2"));
  w = make_world({2, 0});
  w.experts[0].down_delta.b = random_tensor({kWidth, 3}, 1);
  EXPECT_THAT(thrown<core::UserError>([&] { make_mixture(w, 2).forward(w.x, w.base); }), HasSubstr("down_proj"));
  w = make_world({2, 0});
  w.base.up_bias = random_tensor({kInner}, 1);
  EXPECT_THAT(thrown<core::UserError>([&] { make_mixture(w, 2).forward(w.x, w.base); }), HasSubstr("biases"));
}

}  // namespace
}  // namespace moraine::models
