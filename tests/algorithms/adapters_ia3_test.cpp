#include "algorithms/adapters/ia3.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "core/file.h"
#include "core/json.h"
#include "tests/algorithms/adapter_cases.h"
#include "tests/models/random_tensors.h"
#include "tests/temporary_directory.h"

namespace moraine::algorithms::adapters {
namespace {

using testing::HasSubstr;

AdapterConfig ia3_config(std::vector<std::string> modules, const std::vector<std::string>& feedforward) {
  AdapterConfig config;
  config.type = "ia3";
  config.target_modules = std::move(modules);
  config.options["feedforward_modules"] = feedforward;
  return config;
}

TEST(Ia3, CountsAreOneNumberForEveryScaledFeature) {
  // The paper's three vectors a layer: keys, values and the input of the second feed-forward matrix.
  const auto slots = decoder_slots(32, 4096, 1024, 14336);
  const Counts counts = count_of(ia3_config({"k_proj", "v_proj", "down_proj"}, {"down_proj"}), slots);
  EXPECT_EQ(counts.trained, 32 * (1024 + 1024 + 14336));
  EXPECT_EQ(counts.stored, counts.trained);
  EXPECT_EQ(count_of(ia3_config({"down_proj"}, {}), slots).trained, 32 * 4096);
}

TEST(Ia3, LogitsLossGradientsChangesAndFilesAreThoseOfPeft) { expect_equal_to_peft("ia3"); }

TEST(Ia3, KeepsThePromisesOfATypeOfAdapter) {
  const AdapterConfig config = ia3_config({"all-linear"}, {"down_proj", "o_proj"});
  expect_zero_at_init(config);
  // all ones
  expect_linear_promises(config, {}, /*differs=*/false);
}

TEST(Ia3, OwnFilesAreReadBack) {
  const models::Decoder base = golden_base();
  for (const bool regex : {false, true}) {
    const TemporaryDirectory directory;
    AdapterConfig config = ia3_config({"k_proj", "mlp.down_proj"}, {"mlp.down_proj"});
    if (regex) config.options = {{"feedforward_regex", ".*down_proj"}};
    const Adapter adapter = trained_adapter(config, base);
    adapter.save(directory.path());
    core::Json written = core::read_json(directory / "adapter_config.json");
    const core::Json of_peft = core::read_json(golden_directory() / "ia3/adapter_config.json");
    for (const auto& [key, value] : of_peft.items()) EXPECT_EQ(written.erase(key), 1U) << "missing: " << key;
    EXPECT_EQ(written, core::Json::object()) << "fields that PEFT does not write";
    const Adapter again = Adapter::load(directory.path(), base, std::nullopt, at::kCPU);
    EXPECT_EQ(again.config().options, config.options);
    for (size_t i = 0; i < adapter.parameters().size(); ++i)
      EXPECT_TRUE(models::same_bits(again.parameters()[i].second, adapter.parameters()[i].second));
  }
}

TEST(Ia3, NamesOfFeedForwardModulesThatMeanNothingAreErrors) {
  const core::Json ia3 = {{"type", "ia3"}};
  const auto with = [&](const core::Json& more) {
    core::Json config = ia3;
    config.update(more);
    return config;
  };
  checked_config(ia3);
  expect_refused(with({{"target_modules", {"k_proj"}}, {"options", {{"feedforward_modules", {"down_proj"}}}}}),
                 "'down_proj' is not among target_modules");
  expect_refused(with({{"options", {{"feedforward_modules", {3}}}}}), "must be names");
  expect_refused(with({{"options", {{"feedforward_modules", "down_proj"}}}}), "must be array");
  expect_refused(with({{"options", {{"feedforward_modules", {"o_proj"}}, {"feedforward_regex", "o_proj"}}}}),
                 "holds one of them");
  expect_refused(with({{"dropout", 0.1}}), "no dropout");
  expect_refused(with({{"target_modules", {"k_proj"}}, {"layers_to_transform", {1}}}), "no choice of layers");
  expect_refused(with({{"rank", 4}}), "has no rank");
  EXPECT_THAT(models::thrown<core::UserError>(
                  [] { count_of(ia3_config({"all-linear"}, {"down_porj"}), decoder_slots(1, 16, 8, 24)); }),
              HasSubstr("matches no target: 'down_porj'"));
}

}  // namespace
}  // namespace moraine::algorithms::adapters
