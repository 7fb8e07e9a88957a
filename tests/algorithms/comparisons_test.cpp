#include "algorithms/flexmore/comparisons.h"

#include <algorithm>
#include <cmath>

#include <ATen/TensorOperators.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/stack.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "algorithms/flexmore/phlora.h"
#include "core/error.h"
#include "tests/models/random_tensors.h"

namespace moraine::algorithms::flexmore {
namespace {

using models::Decoder;
using models::DecoderConfig;

Decoder tiny(uint64_t seed) {
  return Decoder::from_config(models::tiny_config(DecoderConfig::Family::kOlmo2), seed, at::kFloat);
}

// Bayes' rule token by token, as one would write it down.
std::vector<double> weights_by_hand(const std::vector<double>& likelihoods, int64_t top) {
  std::vector<double> posterior = likelihoods;
  double sum = 0;
  for (const double p : posterior) sum += p;
  for (double& p : posterior) p /= sum;
  std::vector<size_t> order(posterior.size());
  for (size_t e = 0; e < order.size(); ++e) order[e] = e;
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return posterior[a] > posterior[b]; });
  std::vector<double> kept(posterior.size(), 0);
  double mass = 0;
  for (int64_t i = 0; i < top; ++i) mass += posterior[order[static_cast<size_t>(i)]];
  for (int64_t i = 0; i < top; ++i)
    kept[order[static_cast<size_t>(i)]] = posterior[order[static_cast<size_t>(i)]] / mass;
  return kept;
}

TEST(BranchTrainMerge, WeightsAreTheTruncatedPosterior) {
  const int64_t experts = 4, batch = 2, length = 7;
  const at::Tensor log_likelihood = -models::random_tensor({experts, batch, length}, 1).abs();
  for (const int64_t top : {1, 2, 4}) {
    const at::Tensor weights = posterior_weights(log_likelihood, top);
    for (int64_t b = 0; b < batch; ++b) {
      std::vector<double> running(static_cast<size_t>(experts), 1.0);
      for (int64_t t = 0; t < length; ++t) {
        const std::vector<double> expected = weights_by_hand(running, top);
        for (int64_t e = 0; e < experts; ++e) {
          EXPECT_NEAR(weights[e][b][t].item<double>(), expected[static_cast<size_t>(e)], 1e-12)
              << "top " << top << " token " << t;
          running[static_cast<size_t>(e)] *= std::exp(log_likelihood[e][b][t].item<double>());
        }
      }
    }
  }
}

TEST(BranchTrainMerge, LossIsThatOfTheMixtureOfProbabilities) {
  std::vector<Decoder> members;
  for (const uint64_t seed : {1, 2, 3}) members.push_back(tiny(seed));
  at::Tensor sequences = models::random_tokens(2, 9, 40, 4);
  sequences[1].slice(0, 6).fill_(-1);  // padding
  const models::TokenLoss loss = branch_train_merge_loss(members, sequences, 2);
  double expected = 0;
  int64_t count = 0;
  for (int64_t b = 0; b < 2; ++b) {
    std::vector<double> running(members.size(), 1.0);
    for (int64_t t = 0; t < 8; ++t) {
      const int64_t target = sequences[b][t + 1].item<int64_t>();
      if (target < 0) continue;
      const std::vector<double> weights = weights_by_hand(running, 2);
      double probability = 0;
      for (size_t e = 0; e < members.size(); ++e) {
        const at::Tensor prefix =
            sequences[b].slice(0, 0, t + 1).unsqueeze(0).contiguous();  // the model sees nothing later
        const double p = at::softmax(members[e].forward(prefix)[0][t].to(at::kDouble), -1)[target].item<double>();
        probability += weights[e] * p;
        running[e] *= p;
      }
      expected -= std::log(probability);
      ++count;
    }
  }
  EXPECT_EQ(loss.count, count);
  EXPECT_NEAR(loss.sum.item<double>(), expected, 1e-4 * expected);  // float32 forward passes of other lengths
}

TEST(BranchTrainMerge, OfOneModelIsThatModel) {
  const at::Tensor sequences = models::random_tokens(3, 9, 40, 5);
  Decoder model = tiny(1);
  const models::TokenLoss alone = model.loss(sequences, /*count_correct=*/true);
  for (const size_t copies : {1, 3}) {
    std::vector<Decoder> members;
    for (size_t i = 0; i < copies; ++i) members.push_back(tiny(1));
    const models::TokenLoss loss = branch_train_merge_loss(members, sequences, 2);
    EXPECT_EQ(loss.count, alone.count);
    EXPECT_EQ(loss.correct, alone.correct);
    EXPECT_LE(models::relative_error(loss.sum, alone.sum), 1e-6);  // one float32 rounding per token
  }
}

TEST(ScaledChange, GoesFromThePublicExpertToTheTrainedOne) {
  const Decoder base = tiny(1);
  Expert expert{"e", {}, {}, {}};
  for (size_t l = 0; l < 2; ++l) {
    const auto& frozen = base.base(ffn_slot(l));
    const auto noisy = [&](const at::Tensor& w, uint64_t seed) {
      return w + models::random_tensor(w.sizes().vec(), seed).to(at::kFloat);
    };
    expert.layers.push_back(
        {noisy(frozen.gate, 1 + l), noisy(frozen.up, 3 + l), noisy(frozen.down, 5 + l), {}, {}, {}});
    expert.router_rows.push_back(models::random_tensor({16}, 7).to(at::kFloat));
  }
  const auto at_scale = [&](double scale) { return with_scaled_change(expert, base, scale).layers[1].down; };
  EXPECT_TRUE(models::same_bits(at_scale(0), base.base(ffn_slot(1)).down));
  EXPECT_TRUE(models::same_bits(at_scale(1), expert.layers[1].down));
  EXPECT_LE(models::relative_error(at_scale(0.25) * 0.75 + at_scale(0.75) * 0.25,
                                   0.625 * base.base(ffn_slot(1)).down + 0.375 * expert.layers[1].down),
            1e-6);
}

TEST(RandomSubspace, IsTheProjectionOntoItsDirections) {
  const at::Tensor base = models::random_tensor({13, 24}, 1), tuned = models::random_tensor({13, 24}, 2),
                   difference = tuned - base;
  const auto pair = random_subspace_of(tuned, base, 6, 9);
  const at::Tensor a = pair.a.to(at::kDouble), b = pair.b.to(at::kDouble);
  EXPECT_LE(models::relative_error(at::matmul(a, a.t()), at::eye(6, a.options())), 1e-6);  // float32 entries
  EXPECT_LE(at::matmul(difference - at::matmul(b, a), a.t()).abs().max().item<double>(),
            1e-5);  // nothing is left in the subspace
  // All directions: the change itself; another seed: another subspace.
  const auto whole = random_subspace_of(tuned, base, 24, 9);
  EXPECT_LE(models::relative_error(at::matmul(whole.b, whole.a), difference), 1e-5);
  EXPECT_GT(models::relative_error(random_subspace_of(tuned, base, 6, 10).a, pair.a), 0.1);
  EXPECT_THROW(random_subspace_of(tuned, base, 25, 9), core::UserError);
}

TEST(RandomSubspace, OfASmallerRankIsASliceOfALargerOne) {
  const at::Tensor base = models::random_tensor({13, 24}, 1), tuned = models::random_tensor({13, 24}, 2);
  const auto large = slice(random_subspace_of(tuned, base, 8, 3), 5);
  const at::Tensor a = large.a.to(at::kDouble);
  EXPECT_LE(models::relative_error(large.b, at::matmul(tuned - base, a.t())), 1e-5);
}

// E|D Q Q^T|^2 = r / in |D|^2 for a uniformly random subspace; the cut by singular values keeps the most any subspace
// can.
TEST(RandomSubspace, KeepsItsShareOfTheChangeAndLessThanPhLora) {
  const at::Tensor base = models::random_tensor({20, 24}, 1), tuned = models::random_tensor({20, 24}, 2);
  const double total = (tuned - base).square().sum().item<double>();
  double kept = 0;
  const auto cut = low_rank_of(spectrum_of_difference(tuned, base), 6);
  const double best = at::matmul(cut.b, cut.a).square().sum().item<double>() / total;
  for (uint64_t seed = 0; seed < 50; ++seed) {
    const double share = random_subspace_of(tuned, base, 6, seed).b.square().sum().item<double>() /
                         total;  // |B A| = |B|: A's rows are orthonormal
    EXPECT_LT(share, best);
    kept += share / 50;
  }
  EXPECT_NEAR(kept, 6.0 / 24, 0.02);  // standard deviation of the mean of 50 shares is below 0.005
}

TEST(LeastSquaresLine, EqualsTheClosedForm) {
  const Line line = least_squares_line({{1, 2}, {2, 3}, {3, 5}, {4, 4}});  // mean 2.5, 3.5; Sxy 4, Sxx 5, Syy 5
  EXPECT_NEAR(line.slope, 0.8, 1e-12);
  EXPECT_NEAR(line.intercept, 1.5, 1e-12);
  EXPECT_NEAR(line.r2, 0.64, 1e-12);
  const Line exact = least_squares_line({{0, 3}, {1, 1}, {5, -7}});
  EXPECT_NEAR(exact.slope, -2, 1e-12);
  EXPECT_NEAR(exact.r2, 1, 1e-12);
  EXPECT_EQ(least_squares_line({{0, 2}, {1, 2}}).r2, 1);
  EXPECT_THROW(least_squares_line({{1, 2}, {1, 3}}), core::InternalError);
}

}  // namespace
}  // namespace moraine::algorithms::flexmore
