#include "algorithms/adapters/lora_xs.h"

#include <cmath>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_eigvalsh.h>
#include <ATen/ops/matmul.h>
#include <gtest/gtest.h>

#include "core/json.h"
#include "tests/algorithms/adapter_cases.h"
#include "tests/models/random_tensors.h"

namespace moraine::algorithms::adapters {
namespace {

AdapterConfig xs_config(int64_t rank = 3, std::vector<std::string> modules = {"all-linear"}) {
  AdapterConfig config;
  config.type = "lora_xs";
  config.rank = rank;
  config.alpha = 6;
  config.target_modules = std::move(modules);
  return config;
}

TEST(LoraXs, CountsEqualThePublishedNumbers) {
  const auto mistral = decoder_slots(32, 4096, 1024, 14336);
  const Counts counts = count_of(xs_config(96), mistral);
  EXPECT_EQ(counts.trained, 2'064'384);
  EXPECT_EQ(counts.stored, 2'064'384 + 3 * 83'886'080);  // A and B as those of a LoRA, of rank 32 in that number
}

TEST(LoraXs, TheIdentityInTheMiddleGivesTheBestApproximationOfItsRank) {
  const at::NoGradGuard no_grad;
  const models::Decoder base = golden_base();
  AdapterConfig config = xs_config();
  config.alpha = 3;  // scale 1
  const Adapter adapter = Adapter::create(config, base, 1, at::kCPU);
  for (auto [name, r] : adapter.parameters()) r.copy_(at::eye(3));
  for (const auto& [name, delta] : adapter.deltas(base)) {
    // Eckart and Young: what is left has the other singular values, here from the eigenvalues of W W^T.
    const at::Tensor weight = base.weights().at(name).to(at::kDouble), left = weight - delta;
    const at::Tensor squares = at::linalg_eigvalsh(at::matmul(weight, weight.t()));  // ascending
    const double others = squares.narrow(0, 0, squares.size(0) - 3).sum().item<double>();
    EXPECT_NEAR(left.square().sum().item<double>(), others, 1e-5 * squares.sum().item<double>()) << name;  // float32
  }
}

TEST(LoraXs, KeepsThePromisesOfATypeOfAdapter) {
  AdapterConfig config = xs_config();
  config.rank_pattern = {{"q_proj", 5}};
  expect_linear_promises(config, {}, /*differs=*/true);
}

TEST(LoraXs, StartsWithSmallNumbersOfASeedAndAPathAlone) {
  const models::Decoder base = golden_base();
  const Adapter all = Adapter::create(xs_config(8), base, 1, at::kCPU),
                one = Adapter::create(xs_config(8, {"layers.1.mlp.up_proj"}), base, 1, at::kCPU);
  double squares = 0, count = 0;
  for (const auto& [name, r] : all.parameters()) {
    squares += r.detach().square().sum().item<double>();
    count += static_cast<double>(r.numel());
    if (name == one.parameters()[0].first) {
      EXPECT_TRUE(models::same_bits(r, one.parameters()[0].second));
    }
  }
  EXPECT_NEAR(std::sqrt(squares / count), 1e-5, 1e-6);  // 896 numbers: standard error 2.4e-7
}

TEST(LoraXs, StartValuesOfOtherTypesAreRefused) {
  checked_config({{"type", "lora_xs"}, {"rank", 64}, {"alpha", 16}});
  expect_refused({{"type", "lora_xs"}, {"init", "pissa"}}, "leave init out");
  expect_refused({{"type", "lora_xs"}, {"init", "gaussian"}}, "leave init out");
}

}  // namespace
}  // namespace moraine::algorithms::adapters
