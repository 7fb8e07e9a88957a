#include "algorithms/adapters/bitfit.h"

#include <ATen/TensorOperators.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "core/json.h"
#include "tests/algorithms/adapter_cases.h"
#include "tests/models/random_tensors.h"
#include "tests/temporary_directory.h"

namespace moraine::algorithms::adapters {
namespace {

using testing::AllOf;
using testing::HasSubstr;

AdapterConfig bitfit_config() {
  AdapterConfig config;
  config.type = "bitfit";
  return config;
}

TEST(Bitfit, CountsAreTheOutputsOfTheLinears) {
  const Counts counts = count_of(bitfit_config(), decoder_slots(32, 4096, 1024, 14336));
  EXPECT_EQ(counts.trained, 32 * (2 * 4096 + 2 * 1024 + 2 * 14336 + 4096));
  EXPECT_EQ(counts.stored, counts.trained);
}

TEST(Bitfit, KeepsThePromisesOfATypeOfAdapter) {
  const AdapterConfig config = bitfit_config();
  expect_zero_at_init(config);
  expect_gradients(config, golden_base(), {});
  expect_gradients(config, base_with_biases(), {});
  expect_merge_is_forward(config, base_with_biases());
  expect_round_trip(config, golden_base());
  expect_round_trip(config, golden_base(at::kBFloat16));
  expect_round_trip(config, base_with_biases());
  expect_depends_on_seed(config, /*differs=*/false);  // all zeros
}

TEST(Bitfit, TheGradientOfABiasIsTheSumOfItsOutputsGradients) {
  // One slot, y = W x + c, loss = sum of y * g: dc = sum over rows of g, in small whole numbers, so exactly.
  const models::Decoder base = golden_base();
  AdapterConfig config = bitfit_config();
  config.target_modules = {"layers.0.self_attn.q_proj"};
  const Adapter adapter = Adapter::create(config, base, 1, at::kCPU);
  const at::Tensor x = models::random_tensor({5, 16}, 1).to(at::kFloat);
  const at::Tensor g = models::random_tensor({5, 16}, 2).mul(4).round().to(at::kFloat);
  auto slot = base.share();
  adapter.attach(slot);
  const std::string path = adapter.targets()[0].slot.path;
  (slot.attached(path)->forward(x, slot.base(path), {}) * g).sum().backward();
  EXPECT_TRUE(models::same_bits(adapter.parameters()[0].second.grad(), g.sum(0)));
}

TEST(Bitfit, WithoutABiasToMergeIntoTheErrorNamesTheWayOut) {
  const models::Decoder base = golden_base();
  const Adapter adapter = trained_adapter(bitfit_config(), base);
  EXPECT_THAT(models::thrown<core::UserError>([&] { adapter.deltas(base); }),
              AllOf(HasSubstr("changes the bias of model.layers.0.self_attn.q_proj, and this model has none there"),
                    HasSubstr("beside its base model"), HasSubstr("attention_bias")));
  const TemporaryDirectory directory;
  EXPECT_THAT(models::thrown<core::UserError>([&] { adapter.save(directory.path()); }), HasSubstr("PEFT knows no"));
}

TEST(Bitfit, WhatMeansNothingToItIsRefused) {
  checked_config({{"type", "bitfit"}});
  expect_refused({{"type", "bitfit"}, {"rank", 4}}, "has no rank");
  expect_refused({{"type", "bitfit"}, {"init", "gaussian"}}, "has no rank");
  expect_refused({{"type", "bitfit"}, {"dropout", 0.1}}, "leave dropout out");
  expect_refused({{"type", "bitfit"}, {"options", {{"all", true}}}}, "no such option");
}

}  // namespace
}  // namespace moraine::algorithms::adapters
