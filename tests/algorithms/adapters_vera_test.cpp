#include "algorithms/adapters/vera.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/equal.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "core/file.h"
#include "core/json.h"
#include "models/tensor_io.h"
#include "tests/algorithms/adapter_cases.h"
#include "tests/models/random_tensors.h"
#include "tests/temporary_directory.h"

namespace moraine::algorithms::adapters {
namespace {

using models::same_bits;

AdapterConfig vera_config(std::vector<std::string> modules = {"all-linear"}, int64_t rank = 20) {
  AdapterConfig config;
  config.type = "vera";
  config.rank = rank;  // more than the 16 inputs of most slots of the golden model
  config.target_modules = std::move(modules);
  return config;
}

TEST(Vera, CountsEqualThePublishedNumbers) {
  const auto trained = [](const AdapterConfig& config, const std::vector<models::Slot>& slots) {
    return count_of(config, slots).trained;
  };
  EXPECT_EQ(trained(vera_config({"all-linear"}, 1024), decoder_slots(32, 4096, 4096, 11008)), 1'589'248);
  EXPECT_EQ(trained(vera_config({"all-linear"}, 1024), decoder_slots(40, 5120, 5120, 13824)), 2'416'640);
  const AdapterConfig attention = vera_config({"q_proj", "v_proj"}, 1024);
  EXPECT_EQ(trained(attention, decoder_slots(12, 768, 768, 3072)), 43'008);  // RoBERTa-base
  EXPECT_EQ(trained(vera_config({"q_proj", "v_proj"}, 256), decoder_slots(24, 1024, 1024, 4096)), 61'440);
  EXPECT_EQ(trained(vera_config({"q_proj", "v_proj"}, 1), decoder_slots(96, 12288, 12288, 49152)), 2'359'488);
  AdapterConfig with_projections = attention;
  with_projections.options["save_projection"] = true;
  EXPECT_EQ(count_of(attention, decoder_slots(12, 768, 768, 3072)).stored, 43'008);
  EXPECT_EQ(count_of(with_projections, decoder_slots(12, 768, 768, 3072)).stored, 43'008 + 1024 * (768 + 768));
}

TEST(Vera, LogitsLossGradientsChangesAndFilesAreThoseOfPeft) { expect_equal_to_peft("vera"); }

TEST(Vera, ProjectionsAreDrawnAsPeftDrawsThem) {
  const auto file = core::Safetensors::open(golden_directory() / "vera/adapter_model.safetensors");
  AdapterConfig config = vera_config({"q_proj", "v_proj", "down_proj"});
  config.options = {{"projection_prng_key", 5}, {"save_projection", true}};
  const models::Decoder base = golden_base();
  const auto projections = Adapter::create(config, base, 99, at::kCPU).state();
  ASSERT_EQ(projections.size(), 2U);
  EXPECT_EQ(projections[0].first, "shared.vera_A");
  EXPECT_TRUE(same_bits(projections[0].second, models::copy_of(*file.find("base_model.vera_A"))));
  EXPECT_EQ(projections[1].first, "shared.vera_B");
  EXPECT_TRUE(same_bits(projections[1].second, models::copy_of(*file.find("base_model.vera_B"))));
}

TEST(Vera, OwnFilesHoldNoProjectionsAndAreReadBack) {
  const TemporaryDirectory directory;
  const models::Decoder base = golden_base();
  AdapterConfig config = vera_config({"v_proj", "up_proj"});
  config.options["projection_prng_key"] = 11;
  config.dropout = 0.25;
  const Adapter adapter = trained_adapter(config, base);
  adapter.save(directory.path());
  core::Json written = core::read_json(directory / "adapter_config.json");
  EXPECT_EQ(written.at("save_projection"), false);
  EXPECT_EQ(written.at("vera_dropout"), 0.25);
  const core::Json of_peft = core::read_json(golden_directory() / "vera/adapter_config.json");
  for (const auto& [key, value] : of_peft.items()) EXPECT_EQ(written.erase(key), 1U) << "missing: " << key;
  EXPECT_EQ(written, core::Json::object()) << "fields that PEFT does not write";
  EXPECT_EQ(core::Safetensors::open(directory / "adapter_model.safetensors").find("base_model.vera_A"), nullptr);
  models::Decoder one = base.share(), other = base.share();
  adapter.attach(one);
  Adapter::load(directory.path(), base, std::nullopt, at::kCPU).attach(other);
  EXPECT_TRUE(same_bits(other.forward(golden_tensor("tokens")), one.forward(golden_tensor("tokens"))));
}

TEST(Vera, ProjectionsOfAFileAreUsedAndKept) {
  const TemporaryDirectory directory;
  const auto file = core::Safetensors::open(golden_directory() / "vera/adapter_model.safetensors");
  models::NamedTensors tensors;
  for (const auto& view : file.tensors())
    tensors.emplace_back(view.name,
                         view.name == "base_model.vera_A" ? models::copy_of(view) * 2 : models::copy_of(view));
  std::vector<at::Tensor> keep;
  core::write_atomically(directory / "adapter_model.safetensors",
                         core::serialize_safetensors(models::views_of(tensors, keep), {{"format", "pt"}}));
  directory.write("adapter_config.json", core::read_text(golden_directory() / "vera/adapter_config.json"));
  const models::Decoder base = golden_base();
  const auto load = [&](const std::filesystem::path& path) {
    return Adapter::load(path, base, std::nullopt, at::kCPU);
  };
  const auto delta = [&](const Adapter& adapter) { return adapter.deltas(base)[0].second.detach(); };
  const Adapter doubled = load(directory.path());
  EXPECT_TRUE(at::equal(delta(doubled), delta(load(golden_directory() / "vera")) * 2));  // a power of two: exact
  EXPECT_TRUE(at::equal(delta(Adapter::from_artefact(*doubled.to_artefact({}, 1), base, at::kCPU)), delta(doubled)));
}

TEST(Vera, KeepsThePromisesOfATypeOfAdapter) {
  AdapterConfig config = vera_config();
  expect_zero_at_init(config);
  // b = 0
  // of the recipe: b, d are constants, A and B have their own key
  expect_linear_promises(config, {"vera_lambda_d"}, /*differs=*/false);
  config.options["save_projection"] = true;
  expect_round_trip(config, golden_base());
}

TEST(Vera, DropsInputsOfTheChangeAlone) {
  AdapterConfig config = vera_config();
  config.dropout = 0.5;
  models::Decoder model = golden_base();
  const Adapter adapter = trained_adapter(config, model);
  const at::Tensor tokens = golden_tensor("tokens");
  adapter.attach(model);
  const at::Tensor quiet = model.forward(tokens).detach();
  const auto logits = [&](int64_t step) {
    const models::PassScope scope(model, {.training = true, .step = step, .seed = 4});
    return model.forward(tokens).detach();
  };
  EXPECT_FALSE(at::equal(logits(1), quiet));
  EXPECT_TRUE(same_bits(logits(1), logits(1)));
  EXPECT_FALSE(at::equal(logits(1), logits(2)));
}

TEST(Vera, WhatMeansNothingToItIsRefused) {
  const core::Json vera = {{"type", "vera"}, {"rank", 1024}};
  const auto with = [&](const core::Json& more) {
    core::Json config = vera;
    config.update(more);
    return config;
  };
  checked_config(vera);
  for (const core::Json& more : std::vector<core::Json>{{{"alpha", 16}},
                                                        {{"init", "gaussian"}},
                                                        {{"use_rslora", true}},
                                                        {{"rank_pattern", {{{"module", "q_proj"}, {"rank", 4}}}}},
                                                        {{"alpha_pattern", {{{"module", "q_proj"}, {"alpha", 4}}}}}})
    expect_refused(with(more), "leave alpha, init, use_rslora and patterns out");
  expect_refused(with({{"exclude_modules", {"q_proj"}}}), "name the target_modules that are meant");
  expect_refused(with({{"options", {{"projection_prng_key", -1}}}}), "projection_prng_key must be at least 0");
  expect_refused(with({{"options", {{"projection_prng_key", 0.5}}}}), "must be a whole number");
  expect_refused(with({{"options", {{"prng_key", 1}}}}), "no such option");
}

}  // namespace
}  // namespace moraine::algorithms::adapters
