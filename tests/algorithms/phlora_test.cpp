#include "algorithms/flexmore/phlora.h"

#include <algorithm>

#include <ATen/TensorOperators.h>
#include <ATen/ops/diag.h>
#include <ATen/ops/matmul.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "tests/models/random_tensors.h"

namespace moraine::algorithms::flexmore {
namespace {

double squared_norm(const at::Tensor& t) { return t.to(at::kDouble).square().sum().item<double>(); }

// Eckart-Young: what a rank-r cut leaves is the sum of the squared singular values behind r, so more rank is never
// worse.
TEST(PhLora, ErrorOfEveryRankIsTheTailOfTheSpectrum) {
  const at::Tensor base = models::random_tensor({13, 9}, 1), tuned = models::random_tensor({13, 9}, 2);
  const Spectrum spectrum = spectrum_of_difference(tuned, base);
  const at::Tensor difference = tuned - base;
  double before = squared_norm(difference);
  for (int64_t rank = 1; rank <= 9; ++rank) {
    const auto pair = low_rank_of(spectrum, rank);
    const double error = squared_norm(difference - at::matmul(pair.b.to(at::kDouble), pair.a.to(at::kDouble)));
    const double tail = rank < 9 ? squared_norm(spectrum.s.narrow(0, rank, 9 - rank)) : 0;
    EXPECT_NEAR(error, tail, 1e-4) << "rank "
                                   << rank;  // float32 SVD of numbers of order 1: 1e-7 * ||D||^2, with margin
    EXPECT_LE(error, before);
    before = error;
  }
}

TEST(PhLora, SplitIsBalanced) {
  const Spectrum spectrum =
      spectrum_of_difference(models::random_tensor({7, 11}, 3), models::random_tensor({7, 11}, 4));
  const auto pair = low_rank_of(spectrum, 5);
  const at::Tensor expected = at::diag(spectrum.s.narrow(0, 0, 5));
  EXPECT_LT(models::relative_error(at::matmul(pair.a, pair.a.t()), expected), 1e-5);  // float32 orthogonality
  EXPECT_LT(models::relative_error(at::matmul(pair.b.t(), pair.b), expected), 1e-5);
}

TEST(PhLora, SlicingALargerRankIsTheSmallerExtraction) {
  const Spectrum spectrum =
      spectrum_of_difference(models::random_tensor({16, 12}, 5), models::random_tensor({16, 12}, 6));
  const auto sliced = slice(low_rank_of(spectrum, 10), 4), direct = low_rank_of(spectrum, 4);
  EXPECT_TRUE(models::same_bits(sliced.a, direct.a));
  EXPECT_TRUE(models::same_bits(sliced.b, direct.b));
}

TEST(PhLora, RanksAboveTheSmallestSideAreTheSameFunction) {
  const Spectrum spectrum = spectrum_of_difference(models::random_tensor({6, 4}, 7), models::random_tensor({6, 4}, 8));
  EXPECT_EQ(low_rank_of(spectrum, 100).a.size(0), 4);
}

TEST(PhLora, AnUnchangedMatrixHasNoCorrection) {
  const at::Tensor weight = models::random_tensor({6, 4}, 9);
  const auto pair = low_rank_of(spectrum_of_difference(weight, weight), 3);
  EXPECT_EQ(squared_norm(pair.a), 0);
  EXPECT_EQ(squared_norm(pair.b), 0);
}

TEST(PhLora, BadRanksAreRefused) {
  const Spectrum spectrum =
      spectrum_of_difference(models::random_tensor({6, 4}, 10), models::random_tensor({6, 4}, 11));
  EXPECT_THROW(low_rank_of(spectrum, 0), core::UserError);
  EXPECT_THROW(low_rank_of(spectrum, -4), core::UserError);
  EXPECT_THROW(slice(low_rank_of(spectrum, 2), 3), core::UserError);
}

}  // namespace
}  // namespace moraine::algorithms::flexmore
