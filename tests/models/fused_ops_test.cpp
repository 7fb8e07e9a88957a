#include <gtest/gtest.h>

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>

#include "core/error.h"
#include "models/fused_ops.h"
#include "tests/models/random_tensors.h"

namespace moraine::models {
namespace {

struct Outcome {
  at::Tensor y, dx, dweight;
};

// Runs y = f(x, weight) and the backward pass of a fixed direction.
template <typename F>
Outcome run(const F& f, const at::Tensor& x, const at::Tensor& weight) {
  const at::Tensor input = x.detach().clone().set_requires_grad(true),
                   w = weight.detach().clone().set_requires_grad(true);
  const at::Tensor y = f(input, w);
  (y * random_tensor(y.sizes().vec(), 77).to(y.scalar_type())).sum().backward();
  return {y.detach(), input.grad(), w.grad()};
}

TEST(RmsNorm, ForwardAndGradientsEqualTheAtenComposition) {
  // 131 rows: the last block of rows is a partial one; d = 19: the lanes of the sum have a tail.
  const at::Tensor x = random_tensor({131, 19}, 1, 2.0), weight = random_tensor({19}, 2);
  const auto fused = [](const auto& a, const auto& w) { return rms_norm(a, w, 1e-6, NormRounding::kAfterWeight); };
  const auto plain = [](const auto& a, const auto& w) {
    return rms_norm_reference(a, w, 1e-6, NormRounding::kAfterWeight);
  };
  // Two orders of summing 131 terms; unit round-off 6e-8 and 1e-16.
  for (const auto& [dtype, tolerance] : {std::pair(at::kFloat, 2e-6), std::pair(at::kDouble, 1e-14)}) {
    const Outcome a = run(fused, x.to(dtype), weight.to(dtype)), b = run(plain, x.to(dtype), weight.to(dtype));
    EXPECT_LE(relative_error(a.y, b.y), tolerance);
    EXPECT_LE(relative_error(a.dx, b.dx), tolerance);
    EXPECT_LE(relative_error(a.dweight, b.dweight), tolerance);
  }
}

TEST(RmsNorm, RoundsBFloat16WhereEachFamilyDoes) {
  const at::Tensor x = random_tensor({40, 64}, 3).to(at::kBFloat16), weight = random_tensor({64}, 4).to(at::kBFloat16);
  const at::Tensor after = rms_norm(x, weight, 1e-6, NormRounding::kAfterWeight);
  const at::Tensor before = rms_norm(x, weight, 1e-6, NormRounding::kBeforeWeight);
  const auto mismatches = [](const at::Tensor& a, const at::Tensor& b) { return a.ne(b).sum().item<int64_t>(); };
  // The order of a float32 sum may move one value in a few thousand over a rounding boundary; the other rule moves a
  // third of them.
  EXPECT_LE(mismatches(after, rms_norm_reference(x, weight, 1e-6, NormRounding::kAfterWeight)), 8);
  EXPECT_LE(mismatches(before, rms_norm_reference(x, weight, 1e-6, NormRounding::kBeforeWeight)), 8);
  EXPECT_GT(mismatches(after, before), 200);
}

TEST(RmsNorm, BitsDoNotDependOnTheNumberOfThreads) {
  const at::Tensor x = random_tensor({1000, 24}, 5).to(at::kFloat), weight = random_tensor({24}, 6).to(at::kFloat);
  const auto fused = [](const auto& a, const auto& w) { return rms_norm(a, w, 1e-6, NormRounding::kAfterWeight); };
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const Outcome one = run(fused, x, weight);
  at::set_num_threads(3);
  const Outcome three = run(fused, x, weight);
  at::set_num_threads(threads);
  EXPECT_TRUE(same_bits(one.y, three.y));
  EXPECT_TRUE(same_bits(one.dx, three.dx));
  EXPECT_TRUE(same_bits(one.dweight, three.dweight));
}

TEST(RmsNorm, FrozenWeightGetsNoGradient) {
  const at::Tensor x = random_tensor({4, 8}, 7).set_requires_grad(true), weight = random_tensor({8}, 8);
  rms_norm(x, weight, 1e-6, NormRounding::kAfterWeight).sum().backward();
  EXPECT_TRUE(x.grad().defined());
  EXPECT_FALSE(weight.grad().defined());
}

TEST(RmsNorm, RefusesTensorsThatDoNotFit) {
  EXPECT_THROW(rms_norm(random_tensor({4, 8}, 1), random_tensor({7}, 1), 1e-6, NormRounding::kAfterWeight),
               core::InternalError);
  EXPECT_THROW(
      rms_norm(random_tensor({4, 8}, 1), random_tensor({8}, 1).to(at::kFloat), 1e-6, NormRounding::kAfterWeight),
      core::InternalError);
}

TEST(Rotate, ForwardAndGradientEqualTheAtenComposition) {
  const at::Tensor x = random_tensor({2, 7, 3, 10}, 9), angles = random_tensor({9, 5}, 10).to(at::kFloat);
  const at::Tensor cos = angles.cos(), sin = angles.sin();
  const auto fused = [&](const auto& a, const auto&) { return rotate(a, cos, sin); };
  const auto plain = [&](const auto& a, const auto&) { return rotate_reference(a, cos, sin); };
  for (const auto& [dtype, tolerance] :
       {std::pair(at::kFloat, 1e-6), std::pair(at::kDouble, 1e-14), std::pair(at::kBFloat16, 0.005)}) {
    const Outcome a = run(fused, x.to(dtype), x), b = run(plain, x.to(dtype), x);
    EXPECT_LE(relative_error(a.y, b.y), tolerance);
    EXPECT_LE(relative_error(a.dx, b.dx), tolerance);
  }
}

TEST(Rotate, KeepsTheLengthOfEveryPair) {
  const at::Tensor x = random_tensor({1, 5, 2, 6}, 11), angles = random_tensor({5, 3}, 12).to(at::kFloat);
  const at::Tensor y = rotate(x, angles.cos(), angles.sin());
  const auto lengths = [](const at::Tensor& t) { return t.slice(3, 0, 3).square() + t.slice(3, 3).square(); };
  // cos^2 + sin^2 of float32 tables.
  EXPECT_LE(relative_error(lengths(y), lengths(x)), 1e-6);
}

TEST(Rotate, RefusesTablesThatAreTooShort) {
  const at::Tensor tables = random_tensor({3, 2}, 13).to(at::kFloat);
  EXPECT_THROW(rotate(random_tensor({1, 4, 1, 4}, 14), tables, tables), core::InternalError);
}

}  // namespace
}  // namespace moraine::models
