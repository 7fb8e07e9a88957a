#include "algorithms/adapters/lora.h"
#include "algorithms/adapters/adapter.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <optional>

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <c10/core/ScalarType.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "core/file.h"
#include "core/json.h"
#include "core/ordered_json.h"
#include "models/decoder.h"
#include "models/tensor_io.h"
#include "tests/temporary_directory.h"

namespace moraine::algorithms::adapters {
namespace {

using models::Slot;
using models::SlotKind;
using ::testing::AllOf;
using ::testing::HasSubstr;

const std::filesystem::path kGolden = std::filesystem::path(MORAINE_SOURCE_DIR) / "tests/algorithms/golden";

class LoraFiles : public ::testing::Test {
 protected:
  /// The golden adapter, copied, with some fields of its configuration changed.
  std::filesystem::path edited(const core::Json& changes) const {
    std::filesystem::copy(kGolden / "lora_plain", directory_,
                          std::filesystem::copy_options::overwrite_existing | std::filesystem::copy_options::recursive);
    core::Json config = core::read_json(directory_ / "adapter_config.json");
    config.update(changes);
    core::write_atomically(directory_ / "adapter_config.json", config.dump());
    return directory_;
  }
  TemporaryDirectory temporary_;
  const std::filesystem::path& directory_ = temporary_.path();
};

/// The golden file's tensors below a prefix, without it.
std::vector<core::TensorView> below(const core::Safetensors& file, const std::string& prefix) {
  std::vector<core::TensorView> views;
  for (core::TensorView view : file.tensors()) {
    if (!view.name.starts_with(prefix)) continue;
    view.name = view.name.substr(prefix.size());
    views.push_back(view);
  }
  return views;
}

const core::Safetensors& golden() {
  static const core::Safetensors file = core::Safetensors::open(kGolden / "lora_golden.safetensors");
  return file;
}

models::Decoder golden_base(std::optional<at::ScalarType> dtype = std::nullopt) {
  const auto config =
      models::DecoderConfig::from_json(core::parse_json(golden().metadata().at("config"), "golden"), "golden");
  return models::Decoder::from_tensors(config, below(golden(), "base/"), "golden", dtype);
}

at::Tensor golden_tensor(const std::string& name) {
  const core::TensorView* view = golden().find(name);
  MORAINE_CHECK(view != nullptr, "no golden tensor: {}", name);
  return models::copy_of(*view);
}

void expect_close(const at::Tensor& actual, const at::Tensor& expected, const std::string& what) {
  ASSERT_EQ(actual.sizes(), expected.sizes()) << what;
  // float32 on both sides; only the order of sums inside the matrix products differs.
  EXPECT_LE(actual.sub(expected).abs().max().item<double>(), 1e-5 * expected.abs().max().item<double>()) << what;
}

/// Linear slots of a decoder by shapes alone.
std::vector<Slot> decoder_slots(int64_t layers, int64_t d, int64_t kv, int64_t h) {
  std::vector<Slot> slots;
  for (int64_t layer = 0; layer < layers; ++layer) {
    const std::string at = "model.layers." + std::to_string(layer);
    for (const auto& [name, in, out] :
         {std::tuple("q_proj", d, d), {"k_proj", d, kv}, {"v_proj", d, kv}, {"o_proj", d, d}})
      slots.push_back({at + ".self_attn." + name, SlotKind::kLinear, in, out});
    for (const auto& [name, in, out] : {std::tuple("gate_proj", d, h), {"up_proj", d, h}, {"down_proj", h, d}})
      slots.push_back({at + ".mlp." + name, SlotKind::kLinear, in, out});
    slots.push_back({at + ".mlp", SlotKind::kFfn, d, d, h});
  }
  slots.push_back({"lm_head", SlotKind::kLinear, d, 32000});
  return slots;
}

int64_t count(const std::vector<Slot>& slots, int64_t rank, std::vector<std::string> modules) {
  AdapterConfig config;
  config.rank = rank;
  config.target_modules = std::move(modules);
  return lora_parameters(targets_of(config, slots));
}

TEST(LoraCounts, EqualThePublishedNumbersOfRealModels) {
  const std::vector<std::string> dora = {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"};
  const auto llama_7b = decoder_slots(32, 4096, 4096, 11008), llama3_8b = decoder_slots(32, 4096, 1024, 14336);
  EXPECT_EQ(count(llama_7b, 64, {"all-linear"}), 159'907'840);
  EXPECT_EQ(count(decoder_slots(40, 5120, 5120, 13824), 64, {"all-linear"}), 250'347'520);
  EXPECT_EQ(count(llama_7b, 32, dora), 56'098'816);
  EXPECT_EQ(count(llama3_8b, 32, dora), 56'623'104);
  EXPECT_EQ(count(llama3_8b, 32, {"all-linear"}), 83'886'080);  // Mistral-7B has these shapes
  const auto gpt3 = decoder_slots(96, 12288, 12288, 49152);
  EXPECT_EQ(count(gpt3, 8, {"q_proj", "v_proj"}), 37'748'736);
  EXPECT_EQ(count(gpt3, 1, {"q_proj", "v_proj"}), 4'718'592);
  EXPECT_EQ(count(decoder_slots(12, 768, 768, 3072), 8, {"q_proj", "v_proj"}), 294'912);  // RoBERTa-base
}

TEST(LoraTargets, SelectWhatPeftSelectsWithItsRanksAndScales) {
  const models::Decoder base = golden_base();
  for (const core::Json& golden_case : core::read_json(kGolden / "lora_matching.json")) {
    SCOPED_TRACE(golden_case.at("config").dump());
    core::Json json = golden_case.at("config");
    json["peft_type"] = "LORA";
    std::map<std::string, std::pair<int64_t, double>> actual, expected;
    for (const Target& target : targets_of(config_from_peft(json, "golden"), base.slots(), Matching::kAnyName))
      actual[target.slot.path] = {target.rank, target.scale};
    for (const auto& [path, module] : golden_case.at("modules").items())
      expected[path] = {module.at("rank"), module.at("scale")};
    EXPECT_EQ(actual, expected);
  }
}

void expect_user_error(const AdapterConfig& config, const std::string& text) {
  try {
    targets_of(config, decoder_slots(2, 16, 8, 24));
    FAIL() << "expected: " << text;
  } catch (const core::UserError& error) {
    EXPECT_THAT(error.what(), HasSubstr(text));
    EXPECT_FALSE(error.hint().empty());
  }
}

TEST(LoraTargets, NameThatMatchesNoSlotIsAnErrorThatListsTheSlots) {
  AdapterConfig config;
  config.target_modules = {"q_proj", "qproj"};
  expect_user_error(config, "target_modules matches no slot: 'qproj'");
  config.target_modules = {"proj"};  // not a whole segment
  expect_user_error(config, "matches no slot: 'proj'");
  try {
    targets_of(config, decoder_slots(2, 16, 8, 24));
  } catch (const core::UserError& error) {
    EXPECT_THAT(error.hint(),
                AllOf(HasSubstr("down_proj"), HasSubstr("q_proj"), HasSubstr("model.layers.0.self_attn.q_proj")));
  }
  config = {};
  config.exclude_modules = {"o_porj"};
  expect_user_error(config, "exclude_modules matches no slot");
  config = {};
  config.exclude_regex = ".*o_porj";
  expect_user_error(config, "exclude_regex matches no slot");
  config = {};
  config.rank_pattern = {{"q_prj", 2}};
  expect_user_error(config, "rank_pattern matches no slot");
  config = {};
  config.target_regex = "q_proj";  // must match the whole path
  expect_user_error(config, "match no slot");
  config.target_regex = "(q_proj";
  expect_user_error(config, "malformed regular expression");
  config.target_regex = ".*mlp";  // an FFN slot is not linear
  expect_user_error(config, "match no slot");
}

TEST(LoraTargets, RankOutsideTheSlotsSidesIsAnError) {
  for (int64_t rank : {0, -4, 9}) {  // k_proj and v_proj are 8 x 16
    AdapterConfig config;
    config.rank = rank;
    expect_user_error(config, "rank " + std::to_string(rank) + " does not fit model.layers.0.self_attn.");
  }
  AdapterConfig config;
  config.rank_pattern = {{"o_proj", 17}};
  expect_user_error(config, "rank 17 does not fit model.layers.0.self_attn.o_proj (16 x 16)");
}

/// Rank and alpha of each query and key of one layer under a file's fields.
std::map<std::string, std::pair<int64_t, double>> selected(const std::string& fields) {
  const auto json =
      core::parse_ordered_json(R"({"peft_type": "LORA", "r": 4, "lora_alpha": 8, )" + fields + "}", "file");
  std::map<std::string, std::pair<int64_t, double>> out;
  for (const Target& target :
       targets_of(config_from_peft(json, "file"), decoder_slots(2, 16, 8, 24), Matching::kAnyName))
    out[target.slot.path.substr(13)] = {target.rank, target.alpha};
  return out;
}

TEST(LoraTargets, PatternsOfAFileAreTriedInTheOrderOfTheFile) {
  const std::string q = R"("target_modules": ["q_proj"], )";
  using Expected = std::map<std::string, std::pair<int64_t, double>>;
  EXPECT_EQ(selected(q + R"("alpha_pattern": {"q_proj": 32, "layers.0.self_attn.q_proj": 64})"),
            (Expected{{"0.self_attn.q_proj", {4, 32}}, {"1.self_attn.q_proj", {4, 32}}}));
  EXPECT_EQ(selected(q + R"("alpha_pattern": {"layers.0.self_attn.q_proj": 64, "q_proj": 32})"),
            (Expected{{"0.self_attn.q_proj", {4, 64}}, {"1.self_attn.q_proj", {4, 32}}}));
  EXPECT_EQ(selected(q + R"("rank_pattern": {"self_attn.q_proj": 2, "0.self_attn.q_proj": 3})"),
            (Expected{{"0.self_attn.q_proj", {2, 8}}, {"1.self_attn.q_proj", {2, 8}}}));
}

TEST(LoraTargets, FieldsOfTwoTypesAreReadAsPeftReadsThem) {
  const auto names = [](const std::string& fields) {
    std::string list;
    for (const auto& [path, values] : selected(fields)) list += path + " ";
    return list;
  };
  EXPECT_EQ(names(R"("target_modules": ".*\\.0\\.self_attn\\.(q|k)_proj")"), "0.self_attn.k_proj 0.self_attn.q_proj ");
  EXPECT_EQ(names(R"("target_modules": "(?P<any>.*)q_proj\\Z")"), "0.self_attn.q_proj 1.self_attn.q_proj ");
  EXPECT_EQ(names(R"("target_modules": "All-Linear", "exclude_modules": ".*(mlp|layers\\.1|[vko]_proj).*")"),
            "0.self_attn.q_proj ");
  EXPECT_EQ(names(R"("target_modules": ["q_proj"], "exclude_modules": "q_proj")"),
            "0.self_attn.q_proj 1.self_attn.q_proj ")
      << "text is a regular expression for the whole path, not a name";
  EXPECT_EQ(names(R"("target_modules": ["q_proj"], "layers_to_transform": 1)"), "1.self_attn.q_proj ");
  EXPECT_EQ(names(R"("target_modules": ["q_proj"], "layers_to_transform": [0, 7])"), "0.self_attn.q_proj ");
  EXPECT_EQ(
      names(R"("target_modules": ["q_proj"], "rank_pattern": null, "alpha_pattern": null, "layers_to_transform": [])"),
      "0.self_attn.q_proj 1.self_attn.q_proj ");
  EXPECT_THROW(names(R"("target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2.5})"), core::UserError);
  EXPECT_THROW(names(R"("target_modules": ["q_proj"], "rank_pattern": ["q_proj"])"), core::UserError);
  EXPECT_THROW(names(R"("target_modules": "(?<=a)q_proj")"), core::UserError);
}

TEST(LoraSlot, TheTypeFactorsAreStoredInDoesNotDecideHowTheyAreApplied) {
  // 300 * 300 is beyond float16, and 2^-18 is a subnormal there.
  const at::Tensor x = at::full({2, 3}, 9e4, at::kFloat), weight = at::ones({4, 3}, at::kFloat);
  const at::Tensor a = at::full({2, 3}, std::ldexp(1.0, -18), at::kFloat), b = at::full({4, 2}, 0.5, at::kFloat);
  models::SlotBase base;
  base.weight = weight;
  const at::Tensor expected = LoraSlot(a, b, {.scale = 2}).forward(x, base);
  for (const at::ScalarType stored : {at::kHalf, at::kBFloat16}) {
    LoraSlot narrow(a.to(stored), b.to(stored), {.scale = 2});
    EXPECT_TRUE(at::equal(narrow.forward(x, base), expected)) << c10::toString(stored);
    EXPECT_EQ(narrow.delta({})->scalar_type(), at::kFloat) << c10::toString(stored);
    EXPECT_TRUE(at::equal(*narrow.delta({}), *LoraSlot(a, b, {.scale = 2}).delta({}))) << c10::toString(stored);
  }
  base.weight = weight.to(at::kDouble);
  EXPECT_TRUE(at::equal(LoraSlot(a, b, {.scale = 2}).forward(x.to(at::kDouble), base),
                        LoraSlot(a.to(at::kDouble), b.to(at::kDouble), {.scale = 2}).forward(x.to(at::kDouble), base)));
}

TEST(LoraScale, IsAlphaOverRankOrOverItsSquareRoot) {
  AdapterConfig config;
  config.rank = 4;
  config.alpha = 6;
  EXPECT_EQ(targets_of(config, decoder_slots(1, 16, 8, 24))[0].scale, 1.5);
  config.use_rslora = true;
  EXPECT_EQ(targets_of(config, decoder_slots(1, 16, 8, 24))[0].scale, 3);
}

TEST(Adapter, FreshAdapterChangesNoBitAndDetachRestoresTheBase) {
  const at::Tensor tokens = golden_tensor("tokens");
  for (at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    models::Decoder model = golden_base(dtype);
    const at::Tensor before = model.forward(tokens);
    for (const char* init : {"kaiming", "gaussian"}) {
      AdapterConfig config;
      config.init = init;
      const Adapter adapter = Adapter::create(config, model.slots(), 1, at::kCPU);
      adapter.attach(model);
      EXPECT_TRUE(at::equal(model.forward(tokens), before)) << init;
      adapter.detach(model);
      EXPECT_TRUE(at::equal(model.forward(tokens), before)) << init;
    }
  }
}

TEST(Adapter, AtTheStartOnlyBReceivesGradient) {
  models::Decoder model = golden_base();
  const Adapter adapter = Adapter::create({}, model.slots(), 1, at::kCPU);
  adapter.attach(model);
  model.loss(golden_tensor("tokens")).sum.backward();
  for (const auto& [name, tensor] : adapter.parameters()) {
    ASSERT_TRUE(tensor.grad().defined()) << name;
    EXPECT_EQ(tensor.grad().abs().max().item<float>() == 0, name.ends_with("lora_A.weight")) << name;
  }
  for (const auto& [name, weight] : model.weights()) EXPECT_FALSE(weight.grad().defined()) << name;
}

TEST(Adapter, StartValuesHaveThePromisedRangeAndDependOnSeedAndPathAlone) {
  const std::vector<Slot> slots = decoder_slots(1, 256, 256, 512);
  const auto a_of = [&](const std::string& init, uint64_t seed, std::vector<std::string> modules) {
    AdapterConfig config;
    config.rank = 16;
    config.init = init;
    config.target_modules = std::move(modules);
    return Adapter::create(config, slots, seed, at::kCPU).parameters()[0].second.detach();
  };
  const at::Tensor uniform = a_of("kaiming", 1, {"k_proj"}), normal = a_of("gaussian", 1, {"k_proj"});
  EXPECT_LE(uniform.abs().max().item<double>(), 1.0 / 16);                     // 1 / sqrt(256)
  EXPECT_NEAR(uniform.std().item<double>(), 1.0 / 16 / std::sqrt(3.0), 2e-3);  // 4096 samples: standard error 2e-4
  EXPECT_NEAR(normal.std().item<double>(), 1.0 / 16, 4e-3);                    // 1 / r; standard error 7e-4
  EXPECT_TRUE(at::equal(uniform, a_of("kaiming", 1, {"k_proj", "o_proj"}))) << "other slots must not shift the stream";
  EXPECT_FALSE(at::equal(uniform, a_of("kaiming", 2, {"k_proj"})));
  EXPECT_FALSE(at::equal(uniform, a_of("kaiming", 1, {"q_proj"})));
}

TEST(Adapter, DeltaAddedToTheWeightEqualsTheAttachedForward) {
  models::Decoder model = golden_base();
  const Adapter adapter = Adapter::load(kGolden / "lora_plain", model, std::nullopt, at::kCPU);
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> merged;
  std::vector<core::TensorView> views = below(golden(), "base/");
  for (const auto& [name, delta] : adapter.deltas(model)) {
    for (core::TensorView& view : views) {
      if (view.name != name) continue;
      merged.push_back(models::borrow(view).add(delta));
      view.data = {static_cast<const std::byte*>(merged.back().data_ptr()), view.data.size()};
    }
  }
  ASSERT_EQ(merged.size(), adapter.targets().size());
  models::Decoder dense = models::Decoder::from_tensors(model.config(), views, "merged", std::nullopt);
  adapter.attach(model);
  const at::Tensor tokens = golden_tensor("tokens");
  expect_close(dense.forward(tokens), model.forward(tokens), "merged logits");
}

TEST(LoraAgainstPeft, LogitsLossAndGradientsAreEqual) {
  const at::Tensor tokens = golden_tensor("tokens");
  for (const std::string name : {"lora_plain", "lora_rs"}) {
    SCOPED_TRACE(name);
    models::Decoder model = golden_base();
    const Adapter adapter = Adapter::load(kGolden / name, model, std::nullopt, at::kCPU);
    adapter.attach(model);
    expect_close(model.forward(tokens.narrow(1, 0, tokens.size(1) - 1)).detach(), golden_tensor(name + "/logits"),
                 "logits");
    const at::Tensor loss = model.loss(tokens).sum;
    expect_close(loss.detach(), golden_tensor(name + "/loss"), "loss");
    loss.backward();
    const auto expected = below(golden(), name + "/grad/");
    const models::NamedTensors parameters = adapter.parameters();
    ASSERT_EQ(parameters.size(), expected.size());
    for (size_t i = 0; i < expected.size(); ++i) {
      ASSERT_EQ(parameters[i].first, expected[i].name);
      expect_close(parameters[i].second.grad(), models::borrow(expected[i]), expected[i].name);
    }
  }
}

TEST_F(LoraFiles, DirectoryWrittenByPeftRoundTripsByteForByte) {
  for (const std::string name : {"lora_plain", "lora_rs"}) {
    SCOPED_TRACE(name);
    Adapter::load(kGolden / name, golden_base(), std::nullopt, at::kCPU).save(directory_);
    EXPECT_EQ(core::read_text(directory_ / "adapter_config.json"),
              core::read_text(kGolden / name / "adapter_config.json"));
    const auto before = core::Safetensors::open(kGolden / name / "adapter_model.safetensors");
    const auto after = core::Safetensors::open(directory_ / "adapter_model.safetensors");
    EXPECT_EQ(after.metadata(), (std::map<std::string, std::string>{{"format", "pt"}}));
    ASSERT_EQ(before.tensors().size(), after.tensors().size());
    for (size_t i = 0; i < before.tensors().size(); ++i) {
      const core::TensorView &a = before.tensors()[i], &b = after.tensors()[i];
      EXPECT_EQ(a.name, b.name);
      EXPECT_EQ(a.shape, b.shape);
      EXPECT_TRUE(std::ranges::equal(a.data, b.data)) << a.name;
    }
  }
}

TEST_F(LoraFiles, OwnAdapterIsReadBackWithItsConfigurationAndBits) {
  const models::Decoder model = golden_base();
  AdapterConfig config;
  config.rank = 4;
  config.alpha = 2.5;
  config.target_modules = {"q_proj", "up_proj"};
  config.rank_pattern = {{"layers.1.mlp.up_proj", 7}};
  config.alpha_pattern = {{"q_proj", 3}};
  config.layers_to_transform = {1};
  config.use_rslora = true;
  const Adapter adapter = Adapter::create(config, model.slots(), 5, at::kCPU);
  adapter.save(directory_, "some/base");
  const Adapter again = Adapter::load(directory_, model, std::nullopt, at::kCPU);
  core::Json written = core::read_json(directory_ / "adapter_config.json");
  EXPECT_EQ(written.at("base_model_name_or_path"), "some/base");
  const core::Json of_peft = core::read_json(kGolden / "lora_plain/adapter_config.json");
  for (const auto& [key, value] : of_peft.items()) EXPECT_EQ(written.erase(key), 1u) << "missing: " << key;
  EXPECT_EQ(written, core::Json::object()) << "fields that PEFT does not write";
  ASSERT_EQ(again.targets().size(), 2u);
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(again.targets()[i].rank, adapter.targets()[i].rank);
    EXPECT_EQ(again.targets()[i].scale, adapter.targets()[i].scale);
  }
  for (size_t i = 0; i < again.parameters().size(); ++i) {
    EXPECT_EQ(again.parameters()[i].first, adapter.parameters()[i].first);
    EXPECT_TRUE(at::equal(again.parameters()[i].second, adapter.parameters()[i].second));
  }
}

TEST_F(LoraFiles, WithoutTargetModulesTheTensorsSayWhatIsMeant) {
  const auto load = [&](const std::filesystem::path& directory) {
    return Adapter::load(directory, golden_base(), std::nullopt, at::kCPU);
  };
  const Adapter named = load(kGolden / "lora_plain"), unnamed = load(edited({{"target_modules", nullptr}}));
  ASSERT_EQ(named.targets().size(), unnamed.targets().size());
  for (size_t i = 0; i < named.targets().size(); ++i) {
    EXPECT_EQ(unnamed.targets()[i].slot.path, named.targets()[i].slot.path);
    EXPECT_EQ(unnamed.targets()[i].scale, named.targets()[i].scale);
  }
}

TEST_F(LoraFiles, DamagedFactorsAreRefused) {
  Adapter::load(kGolden / "lora_plain", golden_base(), std::nullopt, at::kCPU).save(directory_);
  std::string bytes = core::read_text(directory_ / "adapter_model.safetensors");
  bytes.back() ^= 1;
  core::write_atomically(directory_ / "adapter_model.safetensors", bytes);
  EXPECT_THROW(Adapter::load(directory_, golden_base(), std::nullopt, at::kCPU), core::UserError);
}

TEST_F(LoraFiles, UnknownFieldsSurviveARoundTrip) {
  const auto directory = edited({{"field_of_the_future", {{"x", 1}}}});
  Adapter::load(directory, golden_base(), std::nullopt, at::kCPU).save(directory);
  EXPECT_EQ(core::read_json(directory / "adapter_config.json").at("field_of_the_future"), (core::Json{{"x", 1}}));
}

TEST_F(LoraFiles, WhatWouldComputeSomethingElseIsRefused) {
  for (const auto& [changes, text] : std::vector<std::pair<core::Json, std::string>>{
           {{{"peft_type", "VERA"}}, "peft_type is \"VERA\""},
           {{{"peft_type", nullptr}}, "peft_type is null"},
           {{{"use_dora", true}}, "option not implemented: use_dora=true"},
           {{{"bias", "all"}}, "option not implemented: bias"},
           {{{"modules_to_save", {"lm_head"}}}, "option not implemented: modules_to_save"},
           {{{"init_lora_weights", "pissa"}}, "changes the base weights"},
           {{{"r", "four"}}, "wrong type"},
           {{{"target_modules", {"nothing"}}}, "match no slot"}}) {
    SCOPED_TRACE(changes.dump());
    try {
      Adapter::load(edited(changes), golden_base(), std::nullopt, at::kCPU);
      FAIL() << "was accepted";
    } catch (const core::UserError& error) {
      EXPECT_THAT(error.what(), HasSubstr(text));
      EXPECT_FALSE(error.hint().empty());
    }
  }
}

TEST_F(LoraFiles, TensorsThatDoNotFitAreAllNamed) {
  try {
    Adapter::load(edited({{"target_modules", {"q_proj", "k_proj", "mlp.up_proj", "v_proj"}}, {"r", 3}}), golden_base(),
                  std::nullopt, at::kCPU);
    FAIL() << "was accepted";
  } catch (const core::UserError& error) {
    EXPECT_THAT(error.what(), AllOf(HasSubstr("missing base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"),
                                    HasSubstr("left over base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"),
                                    HasSubstr("q_proj.lora_A.weight is [4, 16], expected [3, 16]")));
  }
}

}  // namespace
}  // namespace moraine::algorithms::adapters
