#include "algorithms/adapters/peft_files.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "algorithms/adapters/config.h"
#include "core/error.h"
#include "core/file.h"
#include "core/ordered_json.h"
#include "models/tensor_io.h"
#include "tests/models/random_tensors.h"
#include "tests/temporary_directory.h"

namespace moraine::algorithms::adapters {
namespace {

using models::random_tensor;
using testing::AllOf;
using testing::HasSubstr;

const std::filesystem::path kGolden = std::filesystem::path(MORAINE_SOURCE_DIR) / "tests/algorithms/golden";

// What PEFT 0.21 wrote (scripts/make_lora_golden.py), through an artefact and back.
TEST(PeftFiles, ImportAndExportReturnEveryByteOfTheTensorsAndEveryField) {
  for (const char* name : {"lora_plain", "lora_rs"}) {
    const TemporaryDirectory directory;
    const auto adapter = import_adapter(kGolden / name);
    EXPECT_EQ(adapter->kind(), "adapter");
    export_adapter(*adapter, directory.path(), "");
    EXPECT_EQ(core::read_json(directory / "adapter_config.json"),
              core::read_json(kGolden / name / "adapter_config.json"));
    const auto theirs = core::Safetensors::open(kGolden / name / "adapter_model.safetensors"),
               ours = core::Safetensors::open(directory / "adapter_model.safetensors");
    ASSERT_EQ(ours.tensors().size(), theirs.tensors().size());
    for (const auto& view : theirs.tensors())
      EXPECT_TRUE(models::same_bits(models::copy_of(*ours.find(view.name)), models::copy_of(view))) << view.name;
    EXPECT_NE(adapter->file().tensors().front().name.find("model.layers."), std::string::npos);
    EXPECT_EQ(adapter->file().tensors().front().name.find("base_model"), std::string::npos);
  }
}

TEST(PeftFiles, PatternsKeepTheOrderInWhichPeftTriesThem) {
  const TemporaryDirectory directory, again;
  const std::string q = "model.layers.0.self_attn.q_proj";
  std::vector<at::Tensor> keep;
  const models::NamedTensors tensors = {{"base_model.model." + q + ".lora_A.weight", random_tensor({4, 16}, 1)},
                                        {"base_model.model." + q + ".lora_B.weight", random_tensor({16, 4}, 2)}};
  core::write_atomically(directory / "adapter_model.safetensors",
                         core::serialize_safetensors(models::views_of(tensors, keep), {}));
  directory.write("adapter_config.json", R"({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"],
      "alpha_pattern": {"q_proj": 32, "0.self_attn.q_proj": 64}})");
  export_adapter(*import_adapter(directory.path()), again.path(), "");
  const auto written = core::read_ordered_json(again / "adapter_config.json").at("alpha_pattern");
  EXPECT_EQ(written.begin().key(), "q_proj");
  EXPECT_EQ(written.size(), 2U);
  EXPECT_EQ(written.at("0.self_attn.q_proj"), 64);
}

// As a method writes it: factors by slot path, the configuration of its recipe.
TEST(PeftFiles, AnAdapterOfARunBecomesAPeftDirectory) {
  const TemporaryDirectory directory;
  AdapterConfig config;
  config.rank = 2;
  config.alpha = 5;
  config.target_modules = {"q_proj"};
  std::vector<at::Tensor> keep;
  const models::NamedTensors factors = {{"model.layers.0.self_attn.q_proj.lora_A.weight", random_tensor({2, 6}, 1)},
                                        {"model.layers.0.self_attn.q_proj.lora_B.weight", random_tensor({4, 2}, 2)}};
  const auto adapter =
      core::Artefact::create("adapter", {{"lora", adapter_schema().to_json(config)}}, models::views_of(factors, keep));
  export_adapter(*adapter, directory.path(), "base");
  const auto json = core::read_json(directory / "adapter_config.json");
  EXPECT_EQ(json["lora_alpha"], 5);
  EXPECT_EQ(json["target_modules"], core::Json({"q_proj"}));
  const auto again = import_adapter(directory.path());
  for (const auto& [name, factor] : factors)
    EXPECT_TRUE(models::same_bits(models::copy_of(*again->file().find(name)), factor)) << name;
}

TEST(PeftFiles, WhatIsNoPlainLoraIsRefused) {
  const TemporaryDirectory directory;
  const auto complaint = [&](const core::Json& changes, const models::NamedTensors& tensors = {}) {
    std::filesystem::copy(kGolden / "lora_plain", directory.path(),
                          std::filesystem::copy_options::overwrite_existing | std::filesystem::copy_options::recursive);
    core::Json config = core::read_json(directory / "adapter_config.json");
    config.update(changes);
    core::write_atomically(directory / "adapter_config.json", config.dump());
    if (!tensors.empty()) {
      std::vector<at::Tensor> keep;
      core::write_atomically(directory / "adapter_model.safetensors",
                             core::serialize_safetensors(models::views_of(tensors, keep), {}));
    }
    return models::thrown<core::UserError>([&] { import_adapter(directory.path()); });
  };
  EXPECT_EQ(complaint(core::Json::object()), "");
  EXPECT_THAT(complaint({{"peft_type", "LOHA"}}),
              AllOf(HasSubstr("peft_type is \"LOHA\""), HasSubstr("adapter_config.json")));
  EXPECT_THAT(complaint({{"target_modules", {"nonsense"}}, {"rank_pattern", core::Json::object()}}),
              AllOf(HasSubstr("match no slot"), HasSubstr("q_proj")));
  EXPECT_THAT(complaint({{"target_modules", {"q_proj", "down_proj"}}}),
              HasSubstr("v_proj has factors, but target_modules does not select it"));
  EXPECT_THAT(complaint({{"rank_pattern", core::Json::object()}}),
              AllOf(HasSubstr("rank 5"), HasSubstr("the configuration says 4")));
  EXPECT_THAT(complaint({{"use_dora", true}}), HasSubstr("is of type dora"));
  const std::string path = "base_model.model.model.layers.0.self_attn.q_proj.";
  EXPECT_THAT(complaint(core::Json::object(), {{path + "lora_A.weight", random_tensor({4, 16}, 1)}}),
              HasSubstr("only one of lora_A and lora_B"));
  EXPECT_THAT(complaint(core::Json::object(), {{path + "lora_A.weight", random_tensor({4, 16}, 1)},
                                               {path + "lora_B.weight", random_tensor({16, 3}, 1)}}),
              HasSubstr("ranks 4 of lora_A and 3 of lora_B"));
  EXPECT_THAT(complaint(core::Json::object(), {{"base_model.model.embed.lora_embedding_A", random_tensor({4, 16}, 1)}}),
              HasSubstr("lora_embedding_A [4, 16] is no factor"));
}

TEST(PeftFiles, ArtefactsThatAreMoreOrLessThanALoraAreRefused) {
  const core::Json meta = {{"lora", adapter_schema().to_json({})}};
  const auto complaint = [&](const models::NamedTensors& tensors) {
    std::vector<at::Tensor> keep;
    const TemporaryDirectory directory;
    const auto artefact = core::Artefact::create("adapter", meta, models::views_of(tensors, keep));
    return models::thrown<core::UserError>([&] { export_adapter(*artefact, directory.path(), ""); });
  };
  const std::pair<std::string, at::Tensor> a = {"x.lora_A.weight", random_tensor({2, 3}, 1)},
                                           b = {"x.lora_B.weight", random_tensor({3, 2}, 2)};
  EXPECT_EQ(complaint({a, b, {"m.x.lora_A.weight", random_tensor({2, 3}, 3)}}), "");  // moments stay behind
  EXPECT_THAT(complaint({a, b, {"x.base_A", random_tensor({2, 3}, 3)}}),
              AllOf(HasSubstr("more than a LoRA"), HasSubstr("'x.base_A'")));
  EXPECT_THAT(complaint({a}), HasSubstr("only one of lora_A and lora_B of x"));
  EXPECT_THAT(complaint({}), HasSubstr("holds no factors"));
  const auto other = core::Artefact::create("evaluation", {}, {});
  EXPECT_THAT(models::thrown<core::UserError>([&] { export_adapter(*other, "out", ""); }),
              AllOf(HasSubstr("no LoRA adapter"), HasSubstr("evaluation")));
}

}  // namespace
}  // namespace moraine::algorithms::adapters
