#include "algorithms/adapters/compacter.h"

#include <algorithm>
#include <string>
#include <vector>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/linalg_matrix_rank.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "tests/algorithms/adapter_cases.h"
#include "tests/models/random_tensors.h"

namespace moraine::algorithms::adapters {
namespace {

AdapterConfig compacter_of(int64_t n) {
  AdapterConfig config;
  config.type = "compacter";
  config.options = {{"n", n}};
  return config;
}

at::Tensor& named(models::NamedTensors& tensors, const std::string& name) {
  return std::ranges::find(tensors, name, &std::pair<std::string, at::Tensor>::first)->second;
}

TEST(Compacter, CountsTheSharedFactorsOnceAndBothSidesOfEverySlot) {
  // A down and an up layer of T5-base per adapter, k = 768 and d = 24: with biases, d + k, the paper's 2,376.
  const std::vector<models::Slot> down_up = {{"down", models::SlotKind::kLinear, 768, 24},
                                             {"up", models::SlotKind::kLinear, 24, 768}};
  for (const int64_t n : {4, 8, 12})
    EXPECT_EQ(count_of(compacter_of(n), down_up).trained, 2'376 - 24 - 768 + n * n * n) << n;
}

TEST(Compacter, KeepsWhatEveryTypeOwes) {
  const models::Decoder base = golden_base();
  for (const int64_t n : {1, 2, 4}) {
    const AdapterConfig config = compacter_of(n);
    expect_gradients(config, base, {});
    expect_merge_is_forward(config, base);  // the fast form against the Kronecker products
    expect_round_trip(config, base);
    expect_depends_on_seed(config, true);
  }
}

TEST(Compacter, ComputesTheExampleOfTheSpecification) {
  const std::vector<models::Slot> slots = {{"slot", models::SlotKind::kLinear, 4, 2}};
  const Adapter adapter = Adapter::create(compacter_of(2), slots, 1, at::kCPU);
  models::NamedTensors tensors = adapter.parameters();
  named(tensors, "shared.phm_rule").set_data(at::tensor({1., 0., 0., 1., 0., -1., 1., 0.}).view({2, 2, 2}));
  named(tensors, "slot.phm_s").set_data(at::tensor({1., 2., 1., 0.}).view({2, 2}));
  named(tensors, "slot.phm_t").set_data(at::tensor({3., 1.}).view({2, 1}));
  const at::NoGradGuard no_grad;
  const at::Tensor h = at::tensor({3., -1., 6., 0., 1., 3., 0., 6.}).view({4, 2});
  EXPECT_TRUE(at::equal(adapter.function(0).delta({})->to(at::kDouble), h.t().to(at::kDouble)));
  models::SlotBase base;
  base.weight = at::zeros({2, 4}, at::kFloat);
  const at::Tensor y = const_cast<SlotAdapter&>(adapter.function(0)).forward(at::ones({1, 4}, at::kFloat), base, {});
  EXPECT_TRUE(at::equal(y, at::tensor({10., 8.}).to(at::kFloat).view({1, 2})));
}

TEST(Compacter, RankIsAtMostThatOfItsTerms) {
  const models::Decoder model = golden_base();
  for (const int64_t n : {1, 2, 4}) {
    for (const auto& [name, change] : trained_adapter(compacter_of(n), model).deltas(model)) {
      const int64_t expected = std::min({n * n, change.size(0), change.size(1)});
      EXPECT_EQ(at::linalg_matrix_rank(change.to(at::kDouble), 1e-5).item<int64_t>(), expected) << name << " " << n;
    }
  }
}

TEST(Compacter, AllSlotsShareOneTensor) {
  models::Decoder model = golden_base();
  const Adapter adapter = trained_adapter(compacter_of(2), model);
  models::NamedTensors tensors = adapter.parameters();
  EXPECT_EQ(std::ranges::count_if(tensors, [](const auto& entry) { return entry.first.starts_with("shared."); }), 1);
  const at::NoGradGuard no_grad;
  named(tensors, "shared.phm_rule").zero_();
  for (const auto& [name, change] : adapter.deltas(model)) EXPECT_EQ(change.abs().max().item<float>(), 0) << name;
}

TEST(Compacter, FreshAdapterChangesALittle) {
  models::Decoder model = golden_base();
  const at::NoGradGuard no_grad;
  const at::Tensor tokens = golden_tensor("tokens"), before = model.forward(tokens);
  Adapter::create(compacter_of(4), model, 1, at::kCPU).attach(model);
  const double change = models::relative_error(model.forward(tokens), before);
  EXPECT_GT(change, 0);
  EXPECT_LT(change, 0.05);  // H is about n * 1e-4 * 1.5 * 1.5, in 14 layers
}

TEST(Compacter, RefusesWhatItCannotDo) {
  expect_refused({{"type", "compacter"}, {"options", {{"n", 0}}}}, "options.n: must be at least 1");
  expect_refused({{"type", "compacter"}, {"rank", 4}}, "has no rank");
  const models::Decoder model = golden_base();
  const std::string message =
      models::thrown<core::UserError>([&] { (void)Adapter::create(compacter_of(3), model, 1, at::kCPU); });
  EXPECT_THAT(message, ::testing::HasSubstr("options.n = 3 does not divide the sides of"));
}

}  // namespace
}  // namespace moraine::algorithms::adapters
