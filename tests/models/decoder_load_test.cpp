#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <set>

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/ones_like.h>

#include "core/error.h"
#include "core/file.h"
#include "core/safetensors.h"
#include "models/decoder.h"
#include "models/tensor_io.h"
#include "tests/models/random_tensors.h"

namespace moraine::models {
namespace {

namespace fs = std::filesystem;
using Family = DecoderConfig::Family;
using testing::AllOf;
using testing::HasSubstr;

class DecoderDirectory : public testing::Test {
 protected:
  DecoderDirectory()
      : path_(fs::path(testing::TempDir()) /
              fmt::format("moraine_{}_{}", getpid(), testing::UnitTest::GetInstance()->current_test_info()->name())) {
    fs::create_directories(path_);
  }
  ~DecoderDirectory() override { fs::remove_all(path_); }

  void write_tensors(const NamedTensors& tensors, const char* name = "model.safetensors") const {
    std::vector<at::Tensor> keep;
    core::write_atomically(path_ / name, core::serialize_safetensors(views_of(tensors, keep), {{"format", "pt"}}));
  }
  void write_config(const DecoderConfig& config) const {
    core::write_atomically(path_ / "config.json", config.to_json().dump());
  }
  static NamedTensors tensors_of(const Decoder& decoder) {
    return {decoder.weights().begin(), decoder.weights().end()};
  }

  fs::path path_;
};

const at::Tensor kTokens = random_tokens(2, 7, 40, 1);

TEST_F(DecoderDirectory, LoadsWhatWasWrittenForEveryFamily) {
  for (const Family family : {Family::kLlama, Family::kOlmo2, Family::kFlexOlmo, Family::kFlexMore}) {
    Decoder original = Decoder::from_config(tiny_config(family), 3, at::kFloat);
    write_config(original.config());
    write_tensors(tensors_of(original));
    Decoder loaded = Decoder::from_directory(path_, std::nullopt);
    EXPECT_EQ(loaded.dtype(), at::kFloat);
    EXPECT_TRUE(same_bits(loaded.forward(kTokens), original.forward(kTokens)));
  }
}

TEST_F(DecoderDirectory, LoadsShards) {
  Decoder original = Decoder::from_config(tiny_config(Family::kOlmo2), 3, at::kFloat);
  const NamedTensors all = tensors_of(original);
  const auto half = all.begin() + static_cast<int64_t>(all.size() / 2);
  write_tensors(NamedTensors(all.begin(), half), "model-00001-of-00002.safetensors");
  write_tensors(NamedTensors(half, all.end()), "model-00002-of-00002.safetensors");
  core::Json map = core::Json::object();
  for (auto at = all.begin(); at != all.end(); ++at)
    map[at->first] = at < half ? "model-00001-of-00002.safetensors" : "model-00002-of-00002.safetensors";
  core::write_atomically(path_ / "model.safetensors.index.json",
                         core::Json{{"metadata", core::Json::object()}, {"weight_map", map}}.dump());
  write_config(original.config());
  EXPECT_TRUE(same_bits(Decoder::from_directory(path_, std::nullopt).forward(kTokens), original.forward(kTokens)));
}

TEST_F(DecoderDirectory, ConvertsOnLoad) {
  Decoder original = Decoder::from_config(tiny_config(Family::kLlama), 3, at::kFloat);
  write_config(original.config());
  write_tensors(tensors_of(original));
  const Decoder loaded = Decoder::from_directory(path_, at::kBFloat16);
  EXPECT_EQ(loaded.dtype(), at::kBFloat16);
  EXPECT_TRUE(
      same_bits(loaded.weights().at("lm_head.weight"), original.weights().at("lm_head.weight").to(at::kBFloat16)));
}

TEST_F(DecoderDirectory, MissingLeftOverAndMisshapenKeysAreListedTogether) {
  const Decoder original = Decoder::from_config(tiny_config(Family::kOlmo2), 3, at::kFloat);
  std::map<std::string, at::Tensor> weights = original.weights();
  weights.erase("model.norm.weight");
  weights["lm_head.weight"] = random_tensor({40, 15}, 1).to(at::kFloat);
  weights["model.layers.0.mlp.extra.weight"] = random_tensor({2}, 1).to(at::kFloat);
  write_config(original.config());
  write_tensors({weights.begin(), weights.end()});
  const std::string message = thrown<core::UserError>([&] { Decoder::from_directory(path_, std::nullopt); });
  EXPECT_THAT(message, AllOf(HasSubstr(path_.string()), HasSubstr("model.norm.weight [16]"),
                             HasSubstr("lm_head.weight [40, 15], expected [40, 16]"),
                             HasSubstr("model.layers.0.mlp.extra.weight")));
}

TEST_F(DecoderDirectory, TensorsThatWritingToolsAddAndNothingReadsAreAccepted) {
  DecoderConfig config = tiny_config(Family::kLlama);
  config.tie_word_embeddings = true;
  Decoder original = Decoder::from_config(config, 3, at::kFloat);
  write_config(original.config());
  std::map<std::string, at::Tensor> weights = original.weights();
  weights["lm_head.weight"] = weights.at("model.embed_tokens.weight");
  weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = random_tensor({2}, 1).to(at::kFloat);
  write_tensors({weights.begin(), weights.end()});
  EXPECT_TRUE(same_bits(Decoder::from_directory(path_, std::nullopt).forward(kTokens), original.forward(kTokens)));
  weights["lm_head.weight"] = weights.at("lm_head.weight") + 1;
  write_tensors({weights.begin(), weights.end()});
  EXPECT_THAT(thrown<core::UserError>([&] { Decoder::from_directory(path_, std::nullopt); }),
              AllOf(HasSubstr("tie_word_embeddings"), HasSubstr("lm_head.weight is not model.embed_tokens.weight")));
}

TEST_F(DecoderDirectory, MoreLayersThanTensorsAreRefusedWithoutListingThem) {
  Decoder original = Decoder::from_config(tiny_config(Family::kOlmo2), 3, at::kFloat);
  write_tensors(tensors_of(original));
  DecoderConfig deep = original.config();
  deep.num_layers = 90000;
  write_config(deep);
  EXPECT_THAT(thrown<core::UserError>([&] { Decoder::from_directory(path_, std::nullopt); }),
              AllOf(HasSubstr("the config says 90000 layers"), HasSubstr("tensors")));
}

TEST_F(DecoderDirectory, StoredTypesThatCannotBeComputedInAreRefused) {
  const Decoder original = Decoder::from_config(tiny_config(Family::kOlmo2), 3, at::kFloat);
  write_config(original.config());
  std::map<std::string, at::Tensor> weights = original.weights();
  weights["model.norm.weight"] = weights["model.norm.weight"].to(at::kBFloat16);
  write_tensors({weights.begin(), weights.end()});
  EXPECT_THAT(thrown<core::UserError>([&] { Decoder::from_directory(path_, std::nullopt); }),
              AllOf(HasSubstr("model.norm.weight"), HasSubstr("BF16")));
  EXPECT_NO_THROW(Decoder::from_directory(path_, at::kFloat));
  weights["model.norm.weight"] = weights["model.norm.weight"].to(at::kChar);
  write_tensors({weights.begin(), weights.end()});
  EXPECT_THAT(thrown<core::UserError>([&] { Decoder::from_directory(path_, at::kFloat); }),
              AllOf(HasSubstr("model.norm.weight"), HasSubstr("I8")));
}

TEST_F(DecoderDirectory, MissingAndTruncatedFilesAreNamed) {
  EXPECT_THAT(thrown<core::UserError>([&] { Decoder::from_directory(path_, std::nullopt); }), HasSubstr("config.json"));
  const Decoder original = Decoder::from_config(tiny_config(Family::kOlmo2), 3, at::kFloat);
  write_config(original.config());
  EXPECT_THAT(thrown<core::UserError>([&] { Decoder::from_directory(path_, std::nullopt); }),
              HasSubstr("model.safetensors"));
  write_tensors(tensors_of(original));
  fs::resize_file(path_ / "model.safetensors", fs::file_size(path_ / "model.safetensors") - 5);
  EXPECT_THAT(thrown<core::UserError>([&] { Decoder::from_directory(path_, std::nullopt); }),
              HasSubstr("model.safetensors"));
}

TEST_F(DecoderDirectory, TrainingNeverWritesToTheMappedFile) {
  const Decoder original = Decoder::from_config(tiny_config(Family::kOlmo2), 3, at::kFloat);
  write_config(original.config());
  write_tensors(tensors_of(original));
  Decoder loaded = Decoder::from_directory(path_, std::nullopt);
  for (auto& [name, leaf] : loaded.make_trainable()) leaf.detach().fill_(0.5);
  const Decoder again = Decoder::from_directory(path_, std::nullopt);
  for (const auto& [name, tensor] : original.weights())
    EXPECT_TRUE(same_bits(again.weights().at(name), tensor)) << name;
}

TEST(DecoderFromTensors, CopiesUnlessAnOwnerKeepsTheBytesAlive) {
  const Decoder original = Decoder::from_config(tiny_config(Family::kOlmo2), 3, at::kFloat);
  std::vector<at::Tensor> keep;
  const auto bytes = std::make_shared<const core::Bytes>(
      core::serialize_safetensors(views_of({original.weights().begin(), original.weights().end()}, keep), {}));
  const core::Safetensors file = core::Safetensors::parse(*bytes, "memory");
  const void* stored = file.find("lm_head.weight")->data.data();
  const Decoder copied = Decoder::from_tensors(original.config(), file.tensors(), "memory", std::nullopt);
  const Decoder borrowed = Decoder::from_tensors(original.config(), file.tensors(), "memory", std::nullopt, bytes);
  EXPECT_NE(copied.weights().at("lm_head.weight").const_data_ptr(), stored);
  EXPECT_EQ(borrowed.weights().at("lm_head.weight").const_data_ptr(), stored);
}

TEST(DecoderFromConfig, WeightsDependOnSeedAndNameAlone) {
  DecoderConfig config = tiny_config(Family::kFlexMore);
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const Decoder one = Decoder::from_config(config, 5, at::kFloat);
  at::set_num_threads(3);
  config.num_layers = 3;
  const Decoder deeper = Decoder::from_config(config, 5, at::kFloat);
  at::set_num_threads(threads);
  const Decoder other = Decoder::from_config(config, 6, at::kFloat);
  std::set<std::string> distinct;
  for (const auto& [name, tensor] : one.weights()) {
    EXPECT_TRUE(same_bits(tensor, deeper.weights().at(name))) << name;
    if (name.ends_with("norm.weight")) continue;
    EXPECT_FALSE(same_bits(tensor, other.weights().at(name))) << name;
    const at::Tensor head = tensor.flatten().slice(0, 0, 4).contiguous();
    distinct.emplace(static_cast<const char*>(head.const_data_ptr()), head.nbytes());
  }
  EXPECT_EQ(distinct.size() + 2 * 4 + 1, one.weights().size());  // 4 norms a layer and the last one are all ones
}

TEST(DecoderFromConfig, WeightsHaveTheirDistribution) {
  DecoderConfig config = tiny_config(Family::kLlama);
  config.vocab_size = 4000, config.initializer_range = 0.02, config.attention_bias = true;
  const Decoder decoder = Decoder::from_config(config, 1, at::kFloat);
  const at::Tensor embedding = decoder.weights().at("model.embed_tokens.weight");  // 64,000 values
  EXPECT_NEAR(embedding.mean().item<double>(), 0.0, 5 * 0.02 / 253);               // five standard errors
  EXPECT_NEAR(embedding.std().item<double>(), 0.02, 5 * 0.02 / 358);
  EXPECT_EQ(decoder.weights().at("model.norm.weight").eq(1).sum().item<int64_t>(), 16);
  EXPECT_EQ(decoder.weights().at("model.layers.1.self_attn.q_proj.bias").ne(0).sum().item<int64_t>(), 0);
}

TEST(DecoderPlus, ChangesTheNamedWeightsAndSharesAllOthers) {
  const Decoder base = Decoder::from_config(tiny_config(Family::kLlama), 1, at::kFloat);
  const std::string name = "model.layers.1.self_attn.q_proj.weight";
  const at::Tensor before = base.weights().at(name).clone();
  const Decoder changed = base.plus({{name, at::ones_like(before)}});
  EXPECT_TRUE(same_bits(base.weights().at(name), before));
  for (const auto& [other, tensor] : changed.weights()) {
    if (other == name) {
      EXPECT_TRUE(same_bits(tensor, before + 1));
    } else {
      EXPECT_EQ(tensor.const_data_ptr(), base.weights().at(other).const_data_ptr()) << other;
    }
  }
  EXPECT_THAT(thrown<core::UserError>([&] {
                (void)base.plus({{"model.nothing.weight", before}});
              }),
              HasSubstr("model.nothing.weight"));
  EXPECT_THAT(thrown<core::UserError>([&] { (void)base.plus({{name, before.narrow(0, 0, 1)}}); }), HasSubstr(name));
}

TEST(DecoderFromConfig, RefusesNumbersThatCannotBeBuilt) {
  DecoderConfig config = tiny_config(Family::kFlexOlmo);
  config.num_experts_per_tok = 5;
  EXPECT_THAT(thrown<core::UserError>([&] { Decoder::from_config(config, 1, at::kFloat); }),
              HasSubstr("num_experts_per_tok"));
}

}  // namespace
}  // namespace moraine::models
