#include "algorithms/mergers/merge_adapters.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "core/file.h"
#include "tests/algorithms/adapter_cases.h"
#include "tests/models/random_tensors.h"
#include "tests/temporary_directory.h"

namespace moraine::algorithms::mergers {
namespace {

using adapters::Adapter;
using adapters::checked_config;
using adapters::golden_base;
using adapters::trained_adapter;
using core::Json;
using models::relative_error;
using models::thrown;
using testing::AllOf;
using testing::HasSubstr;

std::vector<Participant> participants_of(const std::vector<Adapter>& adapters) {
  std::vector<Participant> all;
  const double weights[] = {0.7, -0.4, 1.1};
  for (size_t i = 0; i < adapters.size(); ++i)
    all.push_back({"adapter " + std::to_string(i), std::to_string(i), weights[i], &adapters[i]});
  return all;
}

/// The weighted sum of dense changes, by weight.
std::map<std::string, at::Tensor> summed(const std::vector<Participant>& participants, const models::Backbone& base) {
  std::map<std::string, at::Tensor> sums;
  for (const Participant& one : participants)
    for (const auto& [name, change] : one.adapter->deltas(base)) {
      const at::Tensor part = change.to(at::kDouble) * one.weight;
      sums[name] = sums.contains(name) ? sums[name] + part : part;
    }
  return sums;
}

void expect_sum(const MergedSlots& merged, const std::vector<Participant>& participants, const models::Backbone& base) {
  auto expected = summed(participants, base);
  // The weights of slots of which biases alone change: their changes are zeros.
  std::erase_if(expected, [](const auto& entry) { return entry.second.count_nonzero().template item<int64_t>() == 0; });
  const auto changes = changes_of(merged);
  ASSERT_EQ(changes.size(), expected.size());
  for (const auto& [name, change] : changes)  // deltas() are float32
    EXPECT_LT((change - expected.at(name)).abs().max().item<double>(),
              1e-6 * (1e-6 + expected.at(name).abs().max().item<double>()))
        << name;
}

TEST(MergeAdapters, ConcatOfAnyTypesIsTheSumOfTheirChangesAndBiases) {
  const auto base = adapters::base_with_biases();
  std::vector<Adapter> adapters;
  adapters.push_back(
      trained_adapter(checked_config({{"rank", 2}, {"target_modules", {"q_proj", "down_proj"}}}), base, 1));
  adapters.push_back(
      trained_adapter(checked_config({{"type", "dora"}, {"rank", 3}, {"target_modules", {"q_proj"}}}), base, 2));
  adapters.push_back(trained_adapter(checked_config({{"type", "bitfit"}}), base, 3));
  const auto participants = participants_of(adapters);
  const MergedSlots merged = merge_adapters(participants, base, {.type = "concat"});
  EXPECT_FALSE(merged.at("model.layers.0.self_attn.q_proj").factors);
  EXPECT_TRUE(merged.contains("model.layers.0.self_attn.q_proj.bias"));
  expect_sum(merged, participants, base);
  EXPECT_NO_THROW(base.changed_by(changes_of(merged)));
  const TemporaryDirectory directory;
  EXPECT_THAT(thrown<core::UserError>([&] { write_peft(merged, base, directory / "no", ""); }),
              AllOf(HasSubstr("no LoRA"), HasSubstr("--to hf")));
}

TEST(MergeAdapters, LoraOfEveryKindMergesByItsFactorsAndIsWrittenAsPlainLora) {
  const auto base = golden_base();
  std::vector<Adapter> adapters;
  adapters.push_back(trained_adapter(checked_config({{"rank", 2}, {"alpha", 6}}), base, 1));
  adapters.push_back(trained_adapter(
      checked_config({{"rank", 3}, {"init", "pissa"}, {"target_modules", {"q_proj", "down_proj"}}}), base, 2));
  adapters.push_back(
      trained_adapter(checked_config({{"type", "vera"}, {"rank", 4}, {"target_modules", {"down_proj"}}}), base, 3));
  const auto participants = participants_of(adapters);
  const MergedSlots merged = merge_adapters(participants, base, {.type = "concat"});
  expect_sum(merged, participants, base);
  const TemporaryDirectory directory;
  write_peft(merged, base, directory / "lora", "somewhere");
  const Json config = core::read_json(directory / "lora/adapter_config.json");
  EXPECT_EQ(config["r"], 2);
  EXPECT_EQ(config["lora_alpha"], 2);
  EXPECT_EQ(config["rank_pattern"]["model.layers.1.mlp.down_proj"], 2 + 6 + 4);
  EXPECT_EQ(config["alpha_pattern"]["model.layers.0.self_attn.q_proj"], 2 + 6);
  EXPECT_EQ(config["base_model_name_or_path"], "somewhere");
  const Adapter loaded = Adapter::load(directory / "lora", base, std::nullopt, at::kCPU);
  const auto expected = changes_of(merged);
  const auto changes = loaded.deltas(base);
  ASSERT_EQ(changes.size(), expected.size());
  for (size_t i = 0; i < changes.size(); ++i)  // factors are rounded to float32
    EXPECT_LT(relative_error(changes[i].second.to(at::kDouble), expected[i].second), 1e-6) << changes[i].first;
}

TEST(MergeAdapters, NamesOfModulesAreShortOnlyWhereTheySelectNoOthers) {
  const auto base = golden_base();
  const auto written = [&](const Json& fields) {
    std::vector<Adapter> adapters;
    adapters.push_back(trained_adapter(checked_config(fields), base, 1));
    const TemporaryDirectory directory;
    write_peft(merge_adapters(participants_of(adapters), base, {.type = "svd"}), base, directory / "lora", "");
    EXPECT_NO_THROW(Adapter::load(directory / "lora", base, std::nullopt, at::kCPU));
    return core::read_json(directory / "lora/adapter_config.json")["target_modules"];
  };
  EXPECT_EQ(written({{"rank", 2}, {"target_modules", {"q_proj", "v_proj"}}}), Json({"q_proj", "v_proj"}));
  EXPECT_EQ(written({{"rank", 2}, {"target_modules", {"model.layers.1.mlp.up_proj"}}}),
            Json({"model.layers.1.mlp.up_proj"}));
}

TEST(MergeAdapters, WhatCannotBeMergedOrWrittenIsNamed) {
  const auto base = golden_base();
  const TemporaryDirectory directory;
  std::vector<Adapter> adapters;
  adapters.push_back(trained_adapter(checked_config({{"rank", 10}, {"target_modules", {"q_proj"}}}), base, 1));
  adapters.push_back(trained_adapter(checked_config({{"rank", 10}, {"target_modules", {"q_proj"}}}), base, 2));
  const MergedSlots wide = merge_adapters(participants_of(adapters), base, {.type = "concat"});
  EXPECT_THAT(thrown<core::UserError>([&] { write_peft(wide, base, directory / "no", ""); }),
              AllOf(HasSubstr("rank 20 of a 16 x 16 matrix"), HasSubstr("svd with rank 16")));
  EXPECT_FALSE(std::filesystem::exists(directory / "no"));
  adapters.push_back(trained_adapter(checked_config({{"type", "dora"}, {"rank", 2}}), base, 3));
  EXPECT_THAT(thrown<core::UserError>([&] { merge_adapters(participants_of(adapters), base, {.type = "linear"}); }),
              AllOf(HasSubstr("'adapter 2'"), HasSubstr("works on factors")));
  adapters.pop_back();
  adapters.push_back(trained_adapter(checked_config({{"type", "adaptertune"}, {"rank", 2}}), base, 3));
  EXPECT_THAT(thrown<core::UserError>([&] { merge_adapters(participants_of(adapters), base, {.type = "concat"}); }),
              AllOf(HasSubstr("'adapter 2' is of type adaptertune"), HasSubstr("no change of weights")));
}

}  // namespace
}  // namespace moraine::algorithms::mergers
