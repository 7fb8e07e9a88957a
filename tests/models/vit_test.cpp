// Features, logits, loss and gradients of vision transformers against transformers 4.57.6 and timm 1.0.31
// (scripts/make_vit_golden.py writes the files).
#include "models/vit.h"

#include <filesystem>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/cross_entropy_loss.h>

#include "core/error.h"
#include "core/file.h"
#include "core/safetensors.h"
#include "models/tensor_io.h"
#include "tests/models/random_tensors.h"
#include "tests/temporary_directory.h"

namespace moraine::models {
namespace {

using testing::HasSubstr;

// The decoders' bar; float32 rounding over two layers of width 16 stays a few times below it.
constexpr double kTolerance = 1e-5;

class VitGolden : public testing::TestWithParam<const char*> {
 protected:
  VitGolden()
      : file_(core::Safetensors::open(std::string(MORAINE_SOURCE_DIR "/tests/models/golden/") + GetParam() +
                                      ".safetensors")) {}
  at::Tensor stored(const std::string& name) const { return copy_of(*file_.find(name)); }
  core::Json config() const { return core::parse_json(file_.metadata().at("config"), "golden"); }
  std::vector<core::TensorView> weights() const {
    std::vector<core::TensorView> out;
    for (core::TensorView view : file_.tensors()) {
      if (!view.name.starts_with("weight/")) continue;
      view.name = view.name.substr(std::string("weight/").size());
      out.push_back(view);
    }
    return out;
  }
  Vit model() const { return Vit::from_tensors(config(), weights(), "golden", std::nullopt); }
  std::string prefix() const { return config().at("model_type") == "dinov2" ? "dinov2." : "vit."; }

  core::Safetensors file_;
};

TEST_P(VitGolden, FeaturesAndLogitsEqualTheOriginals) {
  Vit vit = model();
  const at::Tensor images = stored("images");
  EXPECT_LE(relative_error(vit.features(images), stored("features")), kTolerance);
  EXPECT_LE(relative_error(vit.logits(images), stored("logits")), kTolerance);
  EXPECT_LE(relative_error(vit.hidden_states(images).select(1, 0), stored("features")), kTolerance);
}

class VitGradients : public VitGolden {};

TEST_P(VitGradients, OfEveryWeightEqualTransformers) {
  Vit vit = model();
  const NamedTensors weights = vit.make_trainable();
  const at::Tensor loss = at::cross_entropy_loss(vit.logits(stored("images")), stored("labels"));
  EXPECT_LE(relative_error(loss, stored("loss")), kTolerance);
  loss.backward();
  for (const auto& [name, weight] : weights) {
    const std::string stored_name = name.starts_with("classifier.") ? name : prefix() + name;
    const core::TensorView* expected = file_.find("gradient/" + stored_name);
    ASSERT_NE(expected, nullptr) << name;
    ASSERT_TRUE(weight.grad().defined()) << name;
    // A key's bias shifts all scores of a query alike, so its true gradient is zero and both sides hold rounding only.
    if (name.ends_with("attention.key.bias")) {
      EXPECT_LT(weight.grad().abs().max().item<double>(), 1e-6) << name;
      continue;
    }
    EXPECT_LE(relative_error(weight.grad(), copy_of(*expected)), kTolerance) << name;
  }
}

TEST_P(VitGolden, ConfigAndWeightsReadBackTheSame) {
  Vit vit = model();
  TemporaryDirectory folder;
  std::vector<at::Tensor> keep;
  const NamedTensors weights(vit.weights().begin(), vit.weights().end());
  core::write_atomically(folder / "model.safetensors",
                         core::serialize_safetensors(views_of(weights, keep), {{"format", "pt"}}));
  core::write_atomically(folder / "config.json", vit.config().to_json().dump());
  Vit again = Vit::from_directory(folder.path(), std::nullopt);
  EXPECT_TRUE(again.logits(stored("images")).equal(vit.logits(stored("images"))));
  Vit backbone = again.backbone();
  EXPECT_EQ(backbone.config().num_labels, 0);
  EXPECT_TRUE(backbone.features(stored("images")).equal(vit.features(stored("images"))));
  int64_t parameters = 0;
  for (const auto& [name, weight] : backbone.weights()) parameters += weight.numel();
  EXPECT_EQ(parameters, vit.config().backbone_parameters());
}

class VitOtherSizes : public VitGolden {};

TEST_P(VitOtherSizes, InterpolatedPositionsEqualTransformers) {
  const Vit original = model();
  for (const int64_t size : {8, 28}) {
    Vit vit = original.resized(size);
    const at::Tensor images = stored(fmt::format("{}/images", size));
    EXPECT_LE(relative_error(vit.features(images), stored(fmt::format("{}/features", size))), kTolerance) << size;
    EXPECT_LE(relative_error(vit.logits(images), stored(fmt::format("{}/logits", size))), kTolerance) << size;
  }
  Vit same = original.resized(12);
  EXPECT_TRUE(same.features(stored("images")).equal(model().features(stored("images"))));
  EXPECT_THROW(original.resized(10), core::UserError);
  EXPECT_THROW(original.resized(0), core::UserError);
}

TEST_P(VitOtherSizes, AreWrittenAndReadBackAsModelsOfTheirSize) {
  TemporaryDirectory folder;
  std::vector<at::Tensor> keep;
  const Vit original = model(), resized = original.resized(28);
  for (const auto& [path, vit] : {std::pair{folder / "original", &original}, {folder / "resized", &resized}}) {
    std::filesystem::create_directories(path);
    const NamedTensors weights(vit->weights().begin(), vit->weights().end());
    core::write_atomically(path / "model.safetensors", core::serialize_safetensors(views_of(weights, keep), {}));
    core::write_atomically(path / "config.json", vit->config().to_json().dump());
  }
  Vit asked = Vit::from_directory(folder / "original", at::kFloat, 28);
  Vit again = Vit::from_directory(folder / "resized", at::kFloat);
  EXPECT_EQ(again.config().image_size, 28);
  EXPECT_TRUE(again.features(stored("28/images")).equal(asked.features(stored("28/images"))));
}

INSTANTIATE_TEST_SUITE_P(Layouts, VitOtherSizes, testing::Values("dinov2", "dinov2_swiglu"),
                         [](const auto& test) { return std::string(test.param); });

TEST_P(VitGolden, AMissingOrForeignKeyIsNamed) {
  auto tensors = weights();
  const std::string missing = fmt::format("encoder.layer.1.{}.bias", block_names(model().config()).up);
  std::erase_if(tensors,
                [&](const auto& view) { return view.name.ends_with(missing) || view.name == "blocks.1.mlp.fc1.bias"; });
  core::TensorView foreign = tensors.front();
  foreign.name = "reg_token";
  tensors.push_back(foreign);
  try {
    Vit::from_tensors(config(), tensors, "golden", std::nullopt);
    FAIL() << "accepted";
  } catch (const core::UserError& error) {
    EXPECT_THAT(error.what(), HasSubstr(missing));
    EXPECT_THAT(error.what(), HasSubstr("reg_token"));
  }
}

INSTANTIATE_TEST_SUITE_P(Layouts, VitGolden,
                         testing::Values("vit", "vit_no_qkv_bias", "vit_timm", "dinov2", "dinov2_swiglu"),
                         [](const auto& test) { return std::string(test.param); });

INSTANTIATE_TEST_SUITE_P(Layouts, VitGradients, testing::Values("vit", "vit_no_qkv_bias", "dinov2", "dinov2_swiglu"),
                         [](const auto& test) { return std::string(test.param); });

TEST(VitConfig, WrongValuesAreNamedTogether) {
  const auto refusal = [](const core::Json& json) -> std::string {
    try {
      VitConfig::from_json(json, "config.json");
    } catch (const core::UserError& error) {
      return error.what();
    }
    return "accepted";
  };
  EXPECT_THAT(refusal({{"model_type", "bert"}}), HasSubstr("model_type"));
  const std::string wrong = refusal({{"model_type", "vit"},
                                     {"image_size", 30},
                                     {"patch_size", 4},
                                     {"hidden_act", "relu"},
                                     {"num_attention_heads", 7}});
  for (const char* part : {"image_size", "hidden_act", "num_attention_heads"}) EXPECT_THAT(wrong, HasSubstr(part));
  EXPECT_THAT(refusal({{"model_type", "vit"}, {"hidden_size", "wide"}}), HasSubstr("'hidden_size' has the wrong type"));
}

TEST(VitConfig, KeysThatMayChangeTheModelAreNotPassedOver) {
  const auto refusal = [](const core::Json& json) -> std::string {
    try {
      json.contains("architecture") ? VitConfig::from_timm(json,
                                                           {{"patch_embed.proj.weight", {8, 3, 4, 4}},
                                                            {"pos_embed", {1, 5, 8}},
                                                            {"blocks.0.mlp.fc1.weight", {16, 8}},
                                                            {"blocks.0.norm1.weight", {8}}},
                                                           "config.json")
                                    : VitConfig::from_json(json, "config.json");
    } catch (const core::UserError& error) {
      return error.what();
    }
    return "accepted";
  };
  EXPECT_EQ(refusal({{"model_type", "vit"}, {"hidden_dropout_prob", 0.1}, {"id2label", {{"0", "cat"}}}}), "accepted");
  EXPECT_THAT(refusal({{"model_type", "vit"}, {"use_mask_token", true}}), HasSubstr("'use_mask_token' = true"));
  EXPECT_THAT(refusal({{"model_type", "vit"}, {"quantization_config", {{"bits", 4}}}}),
              HasSubstr("quantization_config"));
  EXPECT_EQ(refusal({{"model_type", "dinov2"}, {"use_mask_token", true}, {"drop_path_rate", 0.1}}), "accepted");
  EXPECT_THAT(refusal({{"model_type", "dinov2"}, {"num_register_tokens", 4}}), HasSubstr("num_register_tokens"));
  EXPECT_THAT(refusal({{"model_type", "dinov2"}, {"mlp_ratio", -1}}), HasSubstr("mlp_ratio"));
  const core::Json timm = {
      {"architecture", "vit_tiny_patch4_8"}, {"num_classes", 5}, {"pretrained_cfg", {{"mean", 0.5}}}};
  const auto with = [&](const char* key, const core::Json& value) {
    core::Json json = timm;
    json[key] = value;
    return refusal(json);
  };
  EXPECT_THAT(refusal(timm), HasSubstr("no multiple"));  // 3 heads of 8 values: everything was read
  EXPECT_EQ(with("model_args", {{"num_heads", 2}, {"img_size", 8}}), "accepted");
  EXPECT_THAT(with("model_args", {{"num_heads", 2}, {"act_layer", "quick_gelu"}}), HasSubstr("act_layer"));
  EXPECT_THAT(with("model_args", {{"num_heads", 2}, {"pre_norm", true}}), HasSubstr("pre_norm"));
  EXPECT_THAT(with("global_pool", "avg"), HasSubstr("global_pool"));
  EXPECT_THAT(with("architecture", "vit_base_patch16_clip_quickgelu_224"), HasSubstr("quickgelu"));
}

// Published figure: dinov2-small has 22,056,576 parameters with its mask token [1, 384] and 518 / 14 = 37 patches a
// side.
TEST(VitConfig, ParametersOfDinov2SmallAreThePublishedOnes) {
  const VitConfig config = VitConfig::from_json(
      {{"model_type", "dinov2"}, {"hidden_size", 384}, {"num_attention_heads", 6}, {"image_size", 518}}, "config.json");
  EXPECT_EQ(config.backbone_parameters(), 22'056'576 - 384);
}

TEST(Dinov2Small, PublishedWeightsGiveTransformersFeatures) {
  const std::filesystem::path directory = MORAINE_SOURCE_DIR "/.cache/models/dinov2-small";
  if (!std::filesystem::exists(directory)) GTEST_SKIP() << "no model there: run scripts/fetch_model dinov2-small";
  const auto golden = core::Safetensors::open(MORAINE_SOURCE_DIR "/tests/models/golden/fetched_models.safetensors");
  Vit vit = Vit::from_directory(directory, std::nullopt, 42);
  EXPECT_EQ(vit.config().num_patches(), 9);
  // Twelve float32 layers of width 384 and another order of summation.
  EXPECT_LE(relative_error(vit.features(copy_of(*golden.find("dinov2-small/images"))),
                           copy_of(*golden.find("dinov2-small/features"))),
            2 * kTolerance);
}

TEST(Vit, RandomLayerScalesHaveTheirInitialValue) {
  VitConfig config;
  config.family = VitFamily::kDinov2;
  config.image_size = 8, config.patch_size = 4, config.num_channels = 1, config.hidden_size = 8,
  config.intermediate_size = 32, config.num_layers = 1, config.num_heads = 2, config.layerscale_value = 0.25;
  const Vit vit = Vit::from_config(config, 1, at::kFloat);
  EXPECT_TRUE((vit.weights().at("encoder.layer.0.layer_scale2.lambda1") == 0.25).all().item<bool>());
}

TEST(Vit, ImagesOfAnotherSizeAreRefused) {
  VitConfig config;
  config.image_size = 8, config.patch_size = 4, config.num_channels = 1, config.hidden_size = 8,
  config.intermediate_size = 8, config.num_layers = 1, config.num_heads = 2;
  Vit vit = Vit::from_config(config, 1, at::kFloat);
  EXPECT_THROW(vit.features(random_tensor({2, 1, 8, 12}, 1)), core::UserError);
  EXPECT_THROW(vit.features(random_tensor({2, 3, 8, 8}, 1)), core::UserError);
  EXPECT_EQ(vit.features(random_tensor({2, 1, 8, 8}, 1)).sizes(), (at::IntArrayRef{2, 8}));
}

}  // namespace
}  // namespace moraine::models
