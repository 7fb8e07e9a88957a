#include "algorithms/adapters/factor_spectrum.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/diag.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_svdvals.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "tests/models/random_tensors.h"

namespace moraine::algorithms::adapters {
namespace {

TEST(FactorSpectrum, DiagonalFactorsMultiply) {
  const at::Tensor a = at::matmul(at::diag(at::tensor({4.0, 1.0, 0.5})), at::eye(3, 7, at::kDouble));
  const at::Tensor b = at::matmul(at::eye(5, 3, at::kDouble), at::diag(at::tensor({0.5, 8.0, 2.0})));
  const at::Tensor values = singular_values_of_product(a, b);  // 8, 2, 1
  const double* value = values.const_data_ptr<double>();
  ASSERT_EQ(values.numel(), 3);
  EXPECT_NEAR(value[0], 8, 1e-14);
  EXPECT_NEAR(value[1], 2, 1e-14);
  EXPECT_NEAR(value[2], 1, 1e-14);
}

TEST(FactorSpectrum, EqualsTheDenseProductAlsoAboveFullRank) {
  for (const int64_t rank : {1, 6, 20}) {
    const at::Tensor a = models::random_tensor({rank, 12}, 1), b = models::random_tensor({9, rank}, 2);
    const at::Tensor dense = at::linalg_svdvals(at::matmul(b.to(at::kDouble), a.to(at::kDouble)));
    const at::Tensor values = singular_values_of_product(a, b);
    ASSERT_EQ(values.numel(), std::min<int64_t>({rank, 9, 12}));
    // Both are backward stable in float64: errors of a few ulp of the largest value.
    EXPECT_LT((values - dense.narrow(0, 0, values.numel())).abs().max().item<double>(),
              1e-13 * dense[0].item<double>());
  }
}

TEST(FactorSpectrum, FactorsThatDoNotFitAreRefused) {
  EXPECT_THROW(singular_values_of_product(at::eye(3, 4), at::eye(5, 2)), core::UserError);
  EXPECT_THROW(singular_values_of_product(at::eye(2, 4) / at::zeros({2, 4}), at::eye(5, 2)), core::UserError);
}

}  // namespace
}  // namespace moraine::algorithms::adapters
