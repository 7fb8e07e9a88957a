#include "algorithms/flexmore/mixture_files.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/full.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "algorithms/adapters/adapter.h"
#include "algorithms/adapters/peft_files.h"
#include "core/error.h"
#include "core/file.h"
#include "models/tensor_io.h"
#include "tests/models/random_tensors.h"
#include "tests/temporary_directory.h"

namespace moraine::algorithms::flexmore {
namespace {

using models::DecoderConfig;
using models::random_tensor;
using testing::AllOf;
using testing::HasSubstr;

// float64 over two layers: sums of some dozen terms, in an order that depends on how the weights lie in memory.
constexpr double kRounding = 1e-13;

// A public model with one full-size expert and one of rank 3, float64 so that rounding does not hide a mistake.
MixtureModel sample(int64_t low_rank = 3, bool with_full = true) {
  const auto base = models::Decoder::from_config(models::tiny_config(DecoderConfig::Family::kOlmo2), 1, at::kDouble);
  MixtureModel model{base.config(), base.weights(), {}, 2, false};
  uint64_t seed = 10;
  Expert full{"full", {}, {}, {}}, low{"low", {}, {}, {}};
  for (size_t l = 0; l < static_cast<size_t>(base.config().num_layers); ++l) {
    const auto& frozen = base.base(ffn_slot(l));
    const auto noisy = [&](const at::Tensor& weight) {
      return weight + random_tensor(weight.sizes().vec(), ++seed, 0.2);
    };
    const auto pair = [&](const at::Tensor& weight) {
      return models::LowRank{random_tensor({low_rank, weight.size(1)}, ++seed, 0.3),
                             random_tensor({weight.size(0), low_rank}, ++seed, 0.3)};
    };
    const auto row = [&] { return random_tensor({base.config().hidden_size}, ++seed, 0.3); };
    full.layers.push_back({noisy(frozen.gate), noisy(frozen.up), noisy(frozen.down), {}, {}, {}});
    low.layers.push_back({{}, {}, {}, pair(frozen.gate), pair(frozen.up), pair(frozen.down)});
    full.router_rows.push_back(row());
    low.router_rows.push_back(row());
    model.mixture.public_rows.push_back(row());
  }
  if (with_full) model.mixture.experts.push_back(full);
  model.mixture.experts.push_back(low);
  return model;
}

at::Tensor logits(models::Decoder model) {
  const at::NoGradGuard no_grad;
  return model.forward(models::random_tokens(2, 9, model.config().vocab_size, 5));
}

TEST(MixtureFiles, FlexMoreDirectoryReadsBackByteForByte) {
  const TemporaryDirectory directory;
  const MixtureModel model = sample();
  write_flexmore_directory(model, directory / "a");
  const MixtureModel read = read_mixture_directory(directory / "a");
  EXPECT_EQ(read.mixture.experts.at(0).name, "full");
  EXPECT_EQ(read.mixture.experts.at(1).rank(), 3);
  EXPECT_LE(models::relative_error(logits(assemble(read, at::kDouble)), logits(assemble(model, at::kDouble))),
            kRounding);
  write_flexmore_directory(read, directory / "b");
  for (const char* file : {"model.safetensors", "config.json"})
    EXPECT_EQ(core::read_text(directory / "a" / file), core::read_text(directory / "b" / file)) << file;
}

TEST(MixtureFiles, FlexOlmoDirectoryComputesTheSame) {
  const TemporaryDirectory directory;
  const MixtureModel model = sample();
  write_flexolmo_directory(model, directory.path(), std::nullopt);
  const auto dense = models::Decoder::from_directory(directory.path(), std::nullopt);
  EXPECT_EQ(dense.config().family, DecoderConfig::Family::kFlexOlmo);
  EXPECT_EQ(dense.dtype(), at::kDouble);
  EXPECT_LE(models::relative_error(logits(models::Decoder::from_directory(directory.path(), std::nullopt)),
                                   logits(assemble(model, at::kDouble))),
            kRounding);
  const MixtureModel read = read_mixture_directory(directory.path());
  for (size_t l = 0; l < model.mixture.public_rows.size(); ++l)
    EXPECT_TRUE(models::same_bits(read.mixture.experts[0].layers[l].down, model.mixture.experts[0].layers[l].down));
}

TEST(MixtureFiles, TypesThatMixAreWidenedNotRounded) {
  const TemporaryDirectory directory;
  MixtureModel model = sample();
  for (auto& [name, weight] : model.base_weights) weight = weight.to(at::kBFloat16);
  write_flexolmo_directory(model, directory / "widest", std::nullopt);
  EXPECT_EQ(models::Decoder::from_directory(directory / "widest", std::nullopt).dtype(), at::kDouble);
  write_flexolmo_directory(model, directory / "rounded", at::kBFloat16);
  EXPECT_EQ(models::Decoder::from_directory(directory / "rounded", std::nullopt).dtype(), at::kBFloat16);
}

TEST(MixtureFiles, RouterBiasIsKeptBesideFlexMoreKeysAndRefusedByFlexOlmo) {
  const TemporaryDirectory directory;
  MixtureModel model = sample();
  for (auto& expert : model.mixture.experts)
    for (size_t l = 0; l < expert.layers.size(); ++l) expert.biases.push_back(at::full({1}, -0.75, at::kDouble));
  EXPECT_THAT(models::thrown<core::UserError>([&] { write_flexolmo_directory(model, directory / "no", std::nullopt); }),
              HasSubstr("router bias"));
  EXPECT_FALSE(std::filesystem::exists(directory / "no"));
  write_flexmore_directory(model, directory / "yes");
  const auto with_bias = logits(assemble(read_mixture_directory(directory / "yes"), at::kDouble));
  EXPECT_LE(models::relative_error(with_bias, logits(assemble(model, at::kDouble))), kRounding);
  EXPECT_GE(models::relative_error(with_bias, logits(assemble(sample(), at::kDouble))), 1e-3);
  write_flexmore_directory(sample(), directory / "yes");  // an older bias must not stay behind
  EXPECT_LE(models::relative_error(logits(assemble(read_mixture_directory(directory / "yes"), at::kDouble)),
                                   logits(assemble(sample(), at::kDouble))),
            kRounding);
}

TEST(MixtureFiles, AnExpertAsLoraIsTheDenseModelWithItsFfn) {
  const TemporaryDirectory directory;
  const MixtureModel model = sample();
  const Expert& low = model.mixture.experts[1];
  write_peft_expert(low, directory.path(), "some/base");
  const core::Json config = core::read_json(directory / "adapter_config.json");
  EXPECT_EQ(config["r"], 3);
  EXPECT_EQ(config["lora_alpha"], 3);
  EXPECT_EQ(config["base_model_name_or_path"], "some/base");
  models::NamedTensors weights(model.base_weights.begin(), model.base_weights.end());
  std::vector<at::Tensor> keep;
  auto with_lora = models::Decoder::from_tensors(model.base, models::views_of(weights, keep), "base", std::nullopt);
  const auto adapter = adapters::Adapter::load(directory.path(), with_lora, std::nullopt, at::kCPU);
  adapter.attach(with_lora);
  for (auto& [name, weight] : weights)
    for (size_t l = 0; l < low.layers.size(); ++l) {
      const auto add = [&, path = ffn_slot(l)](const char* part, const models::LowRank& delta) {
        if (name == path + "." + part + ".weight") weight = weight + delta.b.matmul(delta.a);
      };
      add("gate_proj", low.layers[l].gate_delta);
      add("up_proj", low.layers[l].up_delta);
      add("down_proj", low.layers[l].down_delta);
    }
  auto dense = models::Decoder::from_tensors(model.base, models::views_of(weights, keep), "dense", std::nullopt);
  EXPECT_LE(models::relative_error(logits(std::move(with_lora)), logits(std::move(dense))), kRounding);
}

TEST(MixtureFiles, ExportChoosesExpertsAndRefusesWhatHasNoForm) {
  const TemporaryDirectory directory;
  const auto message = [&](const ExportRequest& request) {
    return models::thrown<core::UserError>([&] { export_mixture(sample(), request); });
  };
  EXPECT_THAT(message({"peft", directory / "out", "", {}, "", ""}),
              AllOf(HasSubstr("'full' is full-size"), HasSubstr("--experts")));
  EXPECT_THAT(message({"peft", directory / "out", "", {"lwo"}, "", ""}),
              AllOf(HasSubstr("no expert 'lwo'"), HasSubstr("did you mean 'low'")));
  EXPECT_THAT(message({"hf", directory / "out", "", {}, "", "bfloat16"}), HasSubstr("--dtype"));
  EXPECT_FALSE(std::filesystem::exists(directory / "out"));
  export_mixture(sample(), {"peft", directory / "out", "", {"low"}, "", ""});
  EXPECT_TRUE(std::filesystem::exists(directory / "out/low/adapter_model.safetensors"));
  export_mixture(sample(), {"flexolmo", directory / "one", "", {"low"}, "", ""});
  const auto one = models::Decoder::from_directory(directory / "one", std::nullopt);
  EXPECT_EQ(one.config().num_experts, 2);
  EXPECT_EQ(one.config().num_experts_per_tok, 2);
}

TEST(MixtureFiles, NamesThatLeaveTheDirectoryStandTwiceOrAreNoneAreRefused) {
  const TemporaryDirectory directory;
  write_flexmore_directory(sample(), directory.path());
  const core::Json config = core::read_json(directory / "config.json");
  const auto complaint = [&](const core::Json& names) {
    core::Json changed = config;
    changed["_expert_names"] = names;
    directory.write("config.json", changed.dump());
    return models::thrown<core::UserError>([&] { read_mixture_directory(directory.path()); });
  };
  EXPECT_EQ(complaint({"public", "a", "b"}), "");
  EXPECT_EQ(complaint(nullptr), "");
  EXPECT_THAT(complaint({"public", "../../x", "b"}), AllOf(HasSubstr("cannot be a file name"), HasSubstr("../../x")));
  EXPECT_THAT(complaint({"public", "a", ".."}), HasSubstr("cannot be a file name"));
  EXPECT_THAT(complaint({"public", "a", "a"}), HasSubstr("two experts are named 'a'"));
  EXPECT_THAT(complaint({"public", "a"}), HasSubstr("no list of 3 names"));
  EXPECT_THAT(complaint({"public", "a", 3}), HasSubstr("no list of 3 names"));
}

TEST(MixtureFiles, OneChangedByteOfTheWeightsIsNoticed) {
  const TemporaryDirectory directory;
  MixtureModel model = sample();
  for (auto& expert : model.mixture.experts)
    for (size_t l = 0; l < expert.layers.size(); ++l) expert.biases.push_back(at::full({1}, -0.75, at::kDouble));
  write_flexmore_directory(model, directory.path());
  for (const char* file : {"model.safetensors", "router_bias.safetensors"}) {
    const std::string good = core::read_text(directory / file);
    std::string bad = good;
    bad.back() ^= 1;
    directory.write(file, bad);
    EXPECT_THAT(models::thrown<core::UserError>([&] { read_mixture_directory(directory.path()); }),
                AllOf(HasSubstr(file), HasSubstr("damaged or changed")));
    directory.write(file, good);
  }
  EXPECT_EQ(read_mixture_directory(directory.path()).mixture.experts.size(), 2U);
}

TEST(MixtureFiles, TokeniserFilesOfThePublicModelGoAlong) {
  const TemporaryDirectory directory;
  directory.write("base/tokenizer.json", "{}");
  directory.write("base/generation_config.json", "[]");
  directory.write("base/notes.txt", "mine");
  MixtureModel model = sample();
  model.source = directory / "base";
  write_flexmore_directory(model, directory / "a");
  write_flexolmo_directory(read_mixture_directory(directory / "a"), directory / "b", std::nullopt);
  for (const char* written : {"a", "b"}) {
    EXPECT_EQ(core::read_text(directory / written / "tokenizer.json"), "{}") << written;
    EXPECT_EQ(core::read_text(directory / written / "generation_config.json"), "[]") << written;
    EXPECT_FALSE(std::filesystem::exists(directory / written / "notes.txt")) << written;
  }
}

TEST(MixtureFiles, DirectoriesThatAreNoMixtureAreRefused) {
  const TemporaryDirectory directory;
  directory.write("config.json", models::tiny_config(DecoderConfig::Family::kOlmo2).to_json().dump());
  EXPECT_THAT(models::thrown<core::UserError>([&] { read_mixture_directory(directory.path()); }),
              AllOf(HasSubstr("no mixture"), HasSubstr("olmo2")));
}

}  // namespace
}  // namespace moraine::algorithms::flexmore
