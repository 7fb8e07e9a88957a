// What tasks ask of a model, against its definition.
#include <cmath>
#include <set>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/log_softmax.h>
#include <gtest/gtest.h>

#include "algorithms/objectives/examples.h"
#include "algorithms/objectives/labelled.h"
#include "algorithms/objectives/objective.h"
#include "models/decoder.h"
#include "tests/models/random_tensors.h"

namespace moraine::algorithms::objectives {
namespace {

using data::Example;

std::vector<Example> some_examples() {
  return {{.tokens = {1, 2, 3, 4, 5}, .prompt = 2},
          {.tokens = {6, 7, 8}, .prompt = 1},
          {.tokens = {9, 1, 2, 3}, .prompt = 3}};
}

TEST(Completions, AskForWhatFollowsThePromptAndNothingElse) {
  const auto all = some_examples();
  const ExampleBatch batch = completions(std::vector<std::vector<Example>>{{all[0]}, {all[1]}}, at::kCPU);
  EXPECT_FALSE(batch.input.segments.defined());
  const std::vector<std::vector<int64_t>> tokens = {{1, 2, 3, 4}, {6, 7, 0, 0}},
                                          targets = {{-1, 3, 4, 5}, {7, 8, -1, -1}};
  for (int64_t b = 0; b < 2; ++b)
    for (int64_t t = 0; t < 4; ++t) {
      EXPECT_EQ(batch.input.tokens[b][t].item<int64_t>(), tokens[static_cast<size_t>(b)][static_cast<size_t>(t)]);
      EXPECT_EQ(batch.targets[b][t].item<int64_t>(), targets[static_cast<size_t>(b)][static_cast<size_t>(t)]);
    }
}

TEST(Completions, PackedExamplesLoseAndLearnAsIfEachStoodAlone) {
  const auto all = some_examples();
  const auto loss_of = [&](const std::vector<std::vector<Example>>& rows, std::vector<at::Tensor>& gradients) {
    models::Decoder model =
        models::Decoder::from_config(models::tiny_config(models::DecoderConfig::Family::kLlama), 3, at::kDouble);
    const models::NamedTensors weights = model.make_trainable();
    const ExampleBatch batch = completions(rows, at::kCPU);
    const models::TokenLoss loss = model.token_loss(batch.input, batch.targets, {.few_targets = true});
    loss.sum.backward();
    for (const auto& [name, weight] : weights) gradients.push_back(weight.grad());
    return std::pair(loss.sum.item<double>(), loss.count);
  };
  std::vector<at::Tensor> apart, together;
  const auto alone = loss_of({{all[0]}, {all[1]}, {all[2]}}, apart);
  const auto packed_loss = loss_of({{all[0], all[1], all[2]}}, together);
  EXPECT_EQ(alone.second, 3 + 2 + 1);
  EXPECT_EQ(packed_loss.second, alone.second);
  // Positions go on from one example to the next, and angles are rounded to float32.
  EXPECT_NEAR(packed_loss.first, alone.first, 1e-7 * alone.first);
  for (size_t i = 0; i < apart.size(); ++i) EXPECT_LT(models::relative_error(together[i], apart[i]), 1e-5) << i;
}

TEST(Packing, KeepsTheOrderAndNeverOverflows) {
  const std::vector<int64_t> lengths = {4, 3, 5, 1, 2, 5}, order = {2, 0, 3, 1, 4, 5};
  const auto rows = packed(order, lengths, 5);
  std::vector<int64_t> seen;
  for (const auto& row : rows) {
    int64_t tokens = 0;
    for (const int64_t example : row) tokens += lengths[static_cast<size_t>(example)], seen.push_back(example);
    EXPECT_LE(tokens, 5);
  }
  EXPECT_EQ(seen, order);
  EXPECT_EQ(rows, (std::vector<std::vector<int64_t>>{{2}, {0, 3}, {1, 4}, {5}}));
}

TEST(Classes, LossIsTheSmoothedCrossEntropy) {
  const at::Tensor logits = models::random_tensor({3, 4}, 1);
  const std::vector<int64_t> labels = {2, 0, 3};
  const at::Tensor log_p = at::log_softmax(logits, 1);
  double expected = 0;
  for (int64_t b = 0; b < 3; ++b)
    for (int64_t c = 0; c < 4; ++c)
      expected -= log_p[b][c].item<double>() * (0.1 / 4 + (c == labels[static_cast<size_t>(b)] ? 0.9 : 0));
  EXPECT_NEAR(class_loss(logits, labels, 0.1).item<double>(), expected, 1e-12);
}

TEST(Heads, AreCountedAndHaveABiasWhereTransformersHasOne) {
  for (const bool bias : {false, true}) {
    models::ModelFacts facts;
    facts.width = 6;
    facts.classifier.bias = bias;
    const Head head = Head::fresh(5, facts, 7, at::kCPU), again = Head::fresh(5, facts, 7, at::kCPU);
    int64_t numbers = 0;
    for (const auto& [name, tensor] : head.tensors()) {
      EXPECT_TRUE(tensor.is_leaf() && tensor.requires_grad()) << name;
      numbers += tensor.numel();
    }
    EXPECT_EQ(numbers, Head::count(5, facts));
    EXPECT_EQ(numbers, bias ? 35 : 30);
    EXPECT_TRUE(models::same_bits(head.weight, again.weight));
    EXPECT_FALSE(models::same_bits(head.weight, Head::fresh(5, facts, 8, at::kCPU).weight));
    EXPECT_TRUE(Head::fresh(0, facts, 7, at::kCPU).tensors().empty());
  }
}

TEST(ImageRows, ValidationIsAShareThatTrainingNeverSees) {
  const ImageRows rows = image_rows(200, 0.1);
  EXPECT_EQ(rows.validation.size(), 20U);
  std::set<int64_t> all(rows.train.begin(), rows.train.end());
  all.insert(rows.validation.begin(), rows.validation.end());
  EXPECT_EQ(all.size(), 200U);
  EXPECT_TRUE(image_rows(200, 0).validation.empty());
}

TEST(Options, ThatMeanNothingForAnObjectiveAreNoPartOfItsUnits) {
  const TaskOptions all{.seq_len = 64,
                        .tokenizer = "hf:x",
                        .packing = true,
                        .label_smoothing = 0.1,
                        .mean = 0.4,
                        .deviation = 0.3,
                        .validation_share = 0.2};
  EXPECT_EQ(relevant(all, "images", "train").seq_len, 0);
  EXPECT_EQ(relevant(all, "images", "test").mean, 0.4);
  EXPECT_EQ(relevant(all, "images", "test").validation_share, 0);
  EXPECT_EQ(relevant(all, "images", "validation").validation_share, 0.2);
  EXPECT_EQ(relevant(all, "text", "train").mean, TaskOptions().mean);
  EXPECT_FALSE(relevant(all, "text", "train").packing);
  EXPECT_TRUE(relevant(all, "completion", "train").packing);
  EXPECT_FALSE(relevant(all, "completion", "test").packing);
  EXPECT_EQ(relevant(all, "classification", "test").label_smoothing, 0);
}

}  // namespace
}  // namespace moraine::algorithms::objectives
