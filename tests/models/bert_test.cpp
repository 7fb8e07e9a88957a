// Encoders against transformers 4.57.6 and sentence-transformers (scripts/make_bert_golden.py writes the files).
#include <algorithm>
#include <filesystem>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/matmul.h>

#include "core/error.h"
#include "core/json.h"
#include "core/safetensors.h"
#include "models/bert.h"
#include "models/tensor_io.h"
#include "tests/models/random_tensors.h"

namespace moraine::models {
namespace {

using testing::HasSubstr;

// The bar set for the decoders, too.
constexpr double kTolerance = 1e-5;

class GoldenFile {
 public:
  explicit GoldenFile(const std::string& name)
      : file_(
            core::Safetensors::open(std::string(MORAINE_SOURCE_DIR "/tests/models/golden/") + name + ".safetensors")) {}
  at::Tensor operator()(const std::string& name) const { return copy_of(*file_.find(name)); }
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
  Bert model(std::optional<at::ScalarType> dtype = std::nullopt) const {
    return Bert::from_tensors(BertConfig::from_json(config(), "golden"), weights(), "golden", dtype);
  }

 private:
  core::Safetensors file_;
};

// What lies under the mask does not count; transformers computes something there as well.
at::Tensor masked(const at::Tensor& states, const at::Tensor& mask) {
  return states * mask.unsqueeze(-1).to(states.scalar_type());
}

TEST(BertGolden, HiddenStatesPoolerAndEmbeddingsEqualTransformers) {
  for (const char* name : {"bert", "bert_classifier"}) {
    const GoldenFile golden(name);
    Bert bert = golden.model();
    const at::Tensor tokens = golden("tokens"), mask = golden("mask");
    EXPECT_LE(relative_error(masked(bert.hidden_states(tokens, mask), mask), masked(golden("hidden"), mask)),
              kTolerance)
        << name;
    EXPECT_LE(relative_error(bert.pooled(tokens, mask), golden("pooled")), kTolerance) << name;
    EXPECT_LE(relative_error(bert.embed(tokens, mask), golden("embedding")), kTolerance) << name;
  }
}

TEST(BertGolden, ClassifierAndItsGradientsEqualTransformers) {
  const GoldenFile golden("bert_classifier");
  Bert bert = golden.model();
  EXPECT_EQ(bert.config().num_labels, 3);
  const NamedTensors weights = bert.make_trainable();
  const at::Tensor logits = bert.logits(golden("tokens"), golden("mask"));
  EXPECT_LE(relative_error(logits, golden("logits")), kTolerance);
  const at::Tensor loss = at::cross_entropy_loss(logits, golden("labels"));
  EXPECT_LE(relative_error(loss, golden("loss")), kTolerance);
  loss.backward();
  ASSERT_EQ(weights.size(), golden.weights().size());
  for (const auto& [name, weight] : weights) {
    if (name.ends_with("self.key.bias")) {  // a constant added to all logits of a row: the softmax removes it
      EXPECT_LE(weight.grad().abs().max().item<double>(), 1e-6) << name;
      continue;
    }
    EXPECT_LE(relative_error(weight.grad(), golden("gradient/" + name)), 2 * kTolerance)
        << name;  // backward doubles the operations
  }
}

// As BertForPreTraining of 2019 wrote its checkpoints: a prefix, heads, gamma and beta for a norm's weight and bias.
TEST(BertGolden, CheckpointsOfPreTrainingWithOldNamesGiveTheSameEncoder) {
  const GoldenFile golden("bert");
  std::vector<core::TensorView> old = golden.weights();
  for (core::TensorView& view : old) {
    view.name = "bert." + view.name;
    for (const auto& [name, old_name] :
         {std::pair{"LayerNorm.weight", "LayerNorm.gamma"}, {"LayerNorm.bias", "LayerNorm.beta"}})
      if (view.name.ends_with(name)) view.name.replace(view.name.find(name), std::string::npos, old_name);
  }
  core::TensorView head = old.front();
  head.name = "cls.predictions.transform.LayerNorm.gamma";
  old.push_back(head);
  core::Json config = golden.config();
  config.update({{"output_past", true}, {"eos_token_ids", 0}, {"tie_word_embeddings", true}});
  Bert bert = Bert::from_tensors(BertConfig::from_json(config, "golden"), old, "golden", std::nullopt);
  EXPECT_EQ(bert.config().num_labels, 0);
  Bert same = golden.model();
  EXPECT_TRUE(bert.embed(golden("tokens"), golden("mask")).equal(same.embed(golden("tokens"), golden("mask"))));
}

TEST(BertGolden, BFloat16StaysNearFloat32) {
  const GoldenFile golden("bert");
  Bert bert = golden.model(at::kBFloat16);
  const at::Tensor embedding = bert.embed(golden("tokens"), golden("mask")).to(at::kFloat),
                   expected = golden("embedding");
  EXPECT_LT(((embedding - expected).abs().mean() / expected.abs().mean()).item<double>(),
            0.05);  // 8 bits of mantissa, some ten roundings
}

class FetchedEncoders : public testing::TestWithParam<const char*> {};

TEST_P(FetchedEncoders, GiveTransformersEmbeddingsAndLogits) {
  const std::string name = GetParam();
  const std::filesystem::path directory = std::filesystem::path(MORAINE_SOURCE_DIR "/.cache/models") / name;
  if (!std::filesystem::exists(directory))
    GTEST_SKIP() << "no model there: run scripts/fetch_model " << name.substr(0, name.find('/'));
  const auto golden = core::Safetensors::open(MORAINE_SOURCE_DIR "/tests/models/golden/fetched_models.safetensors");
  const auto stored = [&](const std::string& key) { return golden.find(fmt::format("{}/{}", name, key)); };
  Bert bert = Bert::from_directory(directory, std::nullopt);
  const at::Tensor tokens = copy_of(*stored("tokens")), mask = copy_of(*stored("mask"));
  // Up to twelve float32 layers and another order of summation.
  EXPECT_LE(relative_error(bert.embed(tokens, mask), copy_of(*stored("embedding"))), 2 * kTolerance);
  EXPECT_EQ(bert.config().num_labels > 0, stored("logits") != nullptr);
  if (bert.config().num_labels > 0) {
    EXPECT_LE(relative_error(bert.logits(tokens, mask), copy_of(*stored("logits"))), 2 * kTolerance);
  }
}

INSTANTIATE_TEST_SUITE_P(Models, FetchedEncoders,
                         testing::Values("bert-tiny", "minilm", "rxnfp/pretrained", "rxnfp/ft", "rxnfp/ft_10k_25s"),
                         [](const auto& test) {
                           std::string name = test.param;
                           std::replace_if(
                               name.begin(), name.end(), [](char c) { return c == '/' || c == '-'; }, '_');
                           return name;
                         });

TEST(BertMiniLm, PublishedWeightsGiveSentenceTransformersEmbeddings) {
  const std::filesystem::path directory = MORAINE_SOURCE_DIR "/.cache/encoders/all-minilm-l6-v2";
  if (!std::filesystem::exists(directory / "model.safetensors"))
    GTEST_SKIP() << "no encoder there: run scripts/fetch_encoder";
  const GoldenFile golden("bert_minilm");
  Bert bert = Bert::from_directory(directory, std::nullopt);
  EXPECT_EQ(bert.config().total_parameters(), 22'713'216);
  const at::Tensor embedding = bert.embed(golden("tokens").to(at::kLong), golden("mask"));
  // Six float32 layers of width 384 and another order of summation; transformers' own eager and fused forms differ as
  // much.
  EXPECT_LE(relative_error(embedding, golden("embedding")), 1e-5);
}

TEST(Bert, PaddingDoesNotMatter) {
  BertConfig config;
  config.vocab_size = 30, config.hidden_size = 16, config.intermediate_size = 24, config.num_layers = 2,
  config.num_heads = 4;
  config.max_position_embeddings = 12, config.initializer_range = 0.3;
  Bert bert = Bert::from_config(config, 3, at::kDouble);
  const at::Tensor tokens = random_tokens(2, 8, 30, 5);
  at::Tensor mask = tokens.ge(0), other = tokens.clone();
  mask.slice(1, 5).fill_(false);
  other.slice(1, 5).fill_(29);
  EXPECT_LE(relative_error(bert.embed(tokens, mask), bert.embed(other, mask)), 1e-12);
  EXPECT_LE(relative_error(bert.embed(tokens, mask), bert.embed(tokens.slice(1, 0, 5))), 1e-12);
  EXPECT_GT(relative_error(bert.embed(tokens), bert.embed(other)), 1e-3);
}

// y + x A^T B^T on every query matrix: attaching it equals adding B A to the weights.
class Added final : public SlotFunction {
 public:
  explicit Added(at::Tensor delta) : delta_(std::move(delta)) {}
  at::Tensor forward(const at::Tensor& x, const SlotBase& base, const Pass&) override {
    return base.forward(x) + at::matmul(x, delta_.t());
  }
  NamedTensors parameters() const override { return {}; }

 private:
  at::Tensor delta_;
};

TEST(Bert, SlotsAreNamedAsModulesAndTakeFunctions) {
  const GoldenFile golden("bert_classifier");
  Bert bert = golden.model(at::kDouble);
  EXPECT_EQ(bert.slots().size(), 2u * 7 + 2);
  const std::string path = "bert.encoder.layer.1.attention.self.query";
  const at::Tensor delta = random_tensor({16, 16}, 4, 0.3), tokens = golden("tokens"), plain = bert.logits(tokens);
  bert.attach(path, std::make_shared<Added>(delta));
  const at::Tensor attached = bert.logits(tokens);
  EXPECT_GT(relative_error(attached, plain), 1e-3);
  bert.detach(path);
  EXPECT_TRUE(same_bits(bert.logits(tokens), plain));
  std::vector<core::TensorView> changed = golden.weights();
  std::vector<at::Tensor> keep;
  const at::Tensor weight = bert.weights().at(path + ".weight") + delta;
  for (core::TensorView& view : changed)
    if (view.name == path + ".weight") view = views_of({{view.name, weight}}, keep).front();
  Bert merged = Bert::from_tensors(BertConfig::from_json(golden.config(), "golden"), changed, "golden", at::kDouble);
  EXPECT_LE(relative_error(merged.logits(tokens), attached), 1e-12);
}

TEST(Bert, CountsEqualTheSumOverExpectedTensors) {
  for (const int64_t labels : {0, 3}) {
    BertConfig config;
    config.num_labels = labels;
    int64_t sum = 0;
    for (const auto& [name, shape] : expected_tensors(config)) {
      int64_t count = 1;
      for (const int64_t size : shape) count *= size;
      sum += count;
    }
    EXPECT_EQ(sum, config.total_parameters());
  }
  EXPECT_EQ(BertConfig().total_parameters(), 109'482'240);  // bert-base-uncased as BertModel
}

TEST(Bert, BadInputSaysWhatIsWrong) {
  const GoldenFile golden("bert");
  Bert bert = golden.model();
  const at::Tensor tokens = golden("tokens");
  EXPECT_THAT(thrown<core::UserError>([&] { bert.embed(tokens + 50); }), HasSubstr("vocabulary"));
  EXPECT_THAT(thrown<core::UserError>([&] { bert.embed(random_tokens(1, 13, 50, 1)); }), HasSubstr("12 positions"));
  EXPECT_THAT(thrown<core::UserError>([&] { bert.embed(tokens, tokens.lt(0)); }), HasSubstr("without any token"));
  std::vector<core::TensorView> weights = golden.weights();
  weights.erase(weights.begin());
  EXPECT_THAT(thrown<core::UserError>([&] { Bert::from_tensors(bert.config(), weights, "x", std::nullopt); }),
              HasSubstr("missing (1)"));
}

TEST(BertConfigJson, RoundTripsAndRefusesWhatItCannotDo) {
  BertConfig config;
  config.num_layers = 3, config.layer_norm_eps = 1e-6;
  EXPECT_EQ(BertConfig::from_json(config.to_json(), "test").to_json(), config.to_json());
  const std::pair<const char*, core::Json> changes[] = {
      {"hidden_act", "relu"},   {"position_embedding_type", "relative_key"},
      {"hidden_size", 0},       {"num_attention_heads", 7},
      {"layer_norm_eps", "no"}, {"is_decoder", true},
      {"rope_theta", 10000}};
  for (const auto& [key, value] : changes) {
    core::Json json = config.to_json();
    json[key] = value;
    EXPECT_THAT(thrown<core::UserError>([&] { BertConfig::from_json(json, "base/config.json"); }),
                testing::AllOf(HasSubstr(std::string("'") + key + "'"), HasSubstr("base/config.json")));
  }
  EXPECT_THAT(thrown<core::UserError>([&] {
                BertConfig::from_json({{"model_type", "roberta"}}, "c");
              }),
              HasSubstr("roberta"));
}

}  // namespace
}  // namespace moraine::models
