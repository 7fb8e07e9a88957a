#include "models/open_backbone.h"

#include <filesystem>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/tensor.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "core/file.h"
#include "models/bert.h"
#include "models/checkpoint.h"
#include "models/decoder.h"
#include "models/tensor_io.h"
#include "models/vit.h"
#include "tests/models/random_tensors.h"
#include "tests/temporary_directory.h"

namespace moraine::models {
namespace {

using testing::HasSubstr;

BertConfig small_bert(bool pooler, int64_t labels) {
  BertConfig config;
  config.vocab_size = 19, config.hidden_size = 8, config.intermediate_size = 12, config.num_layers = 2;
  config.num_heads = 2, config.max_position_embeddings = 16, config.pooler = pooler, config.num_labels = labels;
  return config;
}

VitConfig small_vit(int64_t labels) {
  VitConfig config;
  config.hidden_size = 8, config.intermediate_size = 12, config.num_layers = 2, config.num_heads = 2;
  config.image_size = 8, config.patch_size = 4, config.num_channels = 1, config.num_labels = labels;
  return config;
}

template <typename Model>
void write(const Model& model, const std::filesystem::path& directory) {
  std::vector<LazyTensor> tensors;
  for (const auto& [name, tensor] : model.weights())
    tensors.push_back({name, static_cast<int64_t>(tensor.nbytes()), [tensor = tensor] { return tensor; }});
  write_checkpoint(directory, model.config().to_json(), std::move(tensors));
}

TEST(OpenBackbone, ReadsEveryFamilyWithoutItsClassifierAndSaysWhatItIs) {
  const TemporaryDirectory files;
  Decoder decoder = Decoder::from_config(tiny_config(DecoderConfig::Family::kLlama), 1, at::kFloat);
  Bert bert = Bert::from_config(small_bert(true, 3), 2, at::kFloat);
  Vit vit = Vit::from_config(small_vit(5), 3, at::kFloat);
  write(decoder, files / "decoder");
  write(bert, files / "encoder");
  write(vit, files / "vit");
  const at::NoGradGuard no_grad;
  const at::Tensor tokens = random_tokens(2, 5, 19, 4), images = random_tensor({2, 1, 8, 8}, 5).to(at::kFloat);

  const ModelFacts llama = model_facts(files / "decoder");
  EXPECT_EQ(llama.parameters, decoder.config().total_parameters());
  EXPECT_TRUE(llama.predicts_tokens);
  EXPECT_EQ(llama.classifier.architecture, "LlamaForSequenceClassification");
  EXPECT_EQ(llama.slots.size(), decoder.slots().size());
  EXPECT_TRUE(same_bits(open_backbone(files / "decoder", std::nullopt)->features({.tokens = tokens}),
                        decoder.hidden_states(tokens).select(1, -1)));

  const ModelFacts encoder = model_facts(files / "encoder");
  EXPECT_EQ(encoder.parameters, bert.config().total_parameters() - 3 * 8 - 3);
  EXPECT_FALSE(encoder.predicts_tokens);
  for (const Slot& slot : encoder.slots) EXPECT_FALSE(slot.path.starts_with("bert.") || slot.path == "classifier");
  const auto opened = open_backbone(files / "encoder", std::nullopt);
  EXPECT_TRUE(same_bits(opened->features({.tokens = tokens}), bert.pooled(tokens)));
  EXPECT_THAT(thrown<core::UserError>([&] { (void)opened->token_loss({.tokens = tokens}, tokens, {}); }),
              HasSubstr("predicts no tokens"));

  const ModelFacts vision = model_facts(files / "vit");
  EXPECT_EQ(vision.parameters, vit.config().backbone_parameters());
  EXPECT_EQ(vision.image_tokens, 5);
  EXPECT_TRUE(
      same_bits(open_backbone(files / "vit", std::nullopt)->features({.images = images}), vit.features(images)));

  for (const ModelFacts& facts : {llama, encoder, vision})
    EXPECT_EQ(ModelFacts::from_json(facts.to_json()).to_json(), facts.to_json());
}

TEST(OpenBackbone, UnknownTypesAreNamedWithWhatCanBeRead) {
  const TemporaryDirectory files;
  std::filesystem::create_directory(files / "model");
  for (const char* text : {R"({"model_type": "t5"})", R"({"model_type": 5})", "[]", "{}"}) {
    core::write_atomically(files / "model" / "config.json", text);
    EXPECT_THAT(thrown<core::UserError>([&] { (void)model_facts(files / "model"); }), HasSubstr("llama")) << text;
  }
}

TEST(Features, PaddingBehindARowChangesNothing) {
  const at::NoGradGuard no_grad;
  const at::Tensor tokens = random_tokens(2, 4, 19, 4);
  const at::Tensor padded = at::cat({tokens, at::full({2, 3}, 7, at::kLong)}, 1);
  const at::Tensor mask = at::arange(7).lt(4).unsqueeze(0).expand({2, 7});
  Decoder decoder = Decoder::from_config(tiny_config(DecoderConfig::Family::kLlama), 1, at::kDouble);
  Bert pooled = Bert::from_config(small_bert(true, 0), 2, at::kDouble);
  Bert mean = Bert::from_config(small_bert(false, 0), 2, at::kDouble);
  for (Backbone* model : std::vector<Backbone*>{&decoder, &pooled, &mean}) {
    const at::Tensor alone = model->features({.tokens = tokens});
    EXPECT_LT(relative_error(model->features({.tokens = padded, .mask = mask}), alone), 1e-13);
    EXPECT_EQ(alone.size(1), model->width());
  }
  EXPECT_LT(relative_error(mean.features({.tokens = tokens}), mean.hidden_states(tokens).mean(1)), 1e-13);
}

TEST(Backbones, SharedChangedAndOtherWeights) {
  const at::NoGradGuard no_grad;
  const at::Tensor images = random_tensor({2, 1, 8, 8}, 5);
  Vit vit = Vit::from_config(small_vit(0), 3, at::kDouble), other = Vit::from_config(small_vit(0), 4, at::kDouble);
  EXPECT_TRUE(same_bits(vit.shared_on(at::kCPU)->features({.images = images}), vit.features(images)));
  NamedTensors differences;
  for (const auto& [name, weight] : vit.weights()) differences.emplace_back(name, other.weights().at(name) - weight);
  EXPECT_LT(relative_error(vit.changed_by(differences)->features({.images = images}), other.features(images)), 1e-12);
  std::vector<at::Tensor> keep;
  const auto views = views_of({other.weights().begin(), other.weights().end()}, keep);
  EXPECT_TRUE(
      same_bits(vit.with_tensors(views, "other", nullptr)->features({.images = images}), other.features(images)));
  EXPECT_THAT(thrown<core::UserError>(
                  [&] { (void)vit.with_tensors(std::vector(views.begin() + 1, views.end()), "short", nullptr); }),
              HasSubstr(views[0].name));
}

class Families : public testing::TestWithParam<DecoderConfig::Family> {};

TEST_P(Families, SegmentsOfARowAreSequencesOfTheirOwn) {
  const at::NoGradGuard no_grad;
  DecoderConfig config = tiny_config(GetParam());
  if (GetParam() == DecoderConfig::Family::kMistral) config.sliding_window = 3;  // shorter than a segment
  Decoder model = Decoder::from_config(config, 3, at::kDouble);
  const at::Tensor first = random_tokens(1, 5, 19, 1), second = random_tokens(1, 4, 19, 2);
  const at::Tensor targets = random_tokens(1, 9, 19, 3);
  const auto nats = [&](const at::Tensor& tokens, const at::Tensor& wanted) {
    return model.token_loss({.tokens = tokens}, wanted, {}).sum.item<double>();
  };
  const double apart = nats(first, targets.narrow(1, 0, 5)) + nats(second, targets.narrow(1, 5, 4));
  const at::Tensor row = at::cat({first, second}, 1);
  const at::Tensor segments = at::arange(9).ge(5).to(at::kLong).unsqueeze(0);
  const double together = model.token_loss({.tokens = row, .segments = segments}, targets, {}).sum.item<double>();
  EXPECT_NEAR(together, apart, 1e-7 * apart);  // positions go on, and angles are rounded to float32
  EXPECT_GT(std::abs(nats(row, targets) - apart), 1e-6 * apart);
}

INSTANTIATE_TEST_SUITE_P(Segments, Families,
                         testing::Values(DecoderConfig::Family::kLlama, DecoderConfig::Family::kMistral,
                                         DecoderConfig::Family::kQwen2, DecoderConfig::Family::kOlmo2),
                         [](const auto& one) { return std::to_string(static_cast<int>(one.param)); });

TEST(TokenLoss, RowsFewTargetsAndLabelSmoothingAreTheirDefinitions) {
  Decoder model = Decoder::from_config(tiny_config(DecoderConfig::Family::kLlama), 3, at::kDouble);
  const at::NoGradGuard no_grad;
  const int64_t vocabulary = model.config().vocab_size;
  const at::Tensor tokens = random_tokens(2, 4, vocabulary, 1);
  at::Tensor targets = random_tokens(2, 4, vocabulary, 2);
  targets[0][1] = -1, targets[0][2] = -1, targets[1][0] = -1;
  const at::Tensor log_p = at::log_softmax(model.forward(tokens), -1);
  const double smoothing = 0.2;
  std::vector<double> plain(2), smoothed(2);
  int64_t correct = 0;
  for (int64_t b = 0; b < 2; ++b)
    for (int64_t t = 0; t < 4; ++t) {
      const auto target = targets[b][t].item<int64_t>();
      if (target < 0) continue;
      const double own = -log_p[b][t][target].item<double>(), mean = -log_p[b][t].mean().item<double>();
      plain[static_cast<size_t>(b)] += own;
      smoothed[static_cast<size_t>(b)] += (1 - smoothing) * own + smoothing * mean;
      correct += log_p[b][t].argmax().item<int64_t>() == target;
    }
  for (const bool few : {false, true}) {
    const TokenLoss loss =
        model.token_loss({.tokens = tokens}, targets, {.correct = true, .rows = true, .few_targets = few});
    EXPECT_EQ(loss.count, 5);
    EXPECT_EQ(loss.correct, correct);
    EXPECT_NEAR(loss.sum.item<double>(), plain[0] + plain[1], 1e-12);
    for (int64_t b = 0; b < 2; ++b) EXPECT_NEAR(loss.rows[b].item<double>(), plain[static_cast<size_t>(b)], 1e-12);
    EXPECT_NEAR(model.token_loss({.tokens = tokens}, targets, {.few_targets = few, .label_smoothing = smoothing})
                    .sum.item<double>(),
                smoothed[0] + smoothed[1], 1e-12);
  }
}

}  // namespace
}  // namespace moraine::models
