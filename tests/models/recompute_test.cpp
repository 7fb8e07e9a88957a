#include "models/recompute.h"

#include <functional>
#include <memory>
#include <optional>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "models/bert.h"
#include "models/decoder.h"
#include "models/vit.h"
#include "tests/models/random_tensors.h"

namespace moraine::models {
namespace {

TEST(Recomputed, GivesTheSameAndCallsItsPartAgainForTheGradientAlone) {
  const at::Tensor weight = random_tensor({3, 3}, 1).set_requires_grad(true);
  const at::Tensor x = random_tensor({2, 3}, 2).set_requires_grad(true);
  int calls = 0;
  const auto part = [&](const at::Tensor& input) {
    ++calls;
    return (input.matmul(weight)).tanh();
  };
  const at::Tensor y = recomputed(part, x, {weight});
  EXPECT_EQ(calls, 1);
  (y * y).sum().backward();
  EXPECT_EQ(calls, 2);
  const at::Tensor of_x = x.grad().clone(), of_weight = weight.grad().clone();
  x.mutable_grad() = at::Tensor(), weight.mutable_grad() = at::Tensor();
  const at::Tensor plain = part(x);
  (plain * plain).sum().backward();
  EXPECT_TRUE(same_bits(plain, y) && same_bits(x.grad(), of_x) && same_bits(weight.grad(), of_weight));
  {
    const at::NoGradGuard no_grad;
    calls = 0;
    EXPECT_FALSE(recomputed(part, x, {weight}).requires_grad());
    EXPECT_EQ(calls, 1);
  }
}

TEST(Recomputed, AnInputWithoutGradientDoesNotStopThoseOfThePart) {
  const at::Tensor weight = random_tensor({3, 3}, 1).set_requires_grad(true), x = random_tensor({2, 3}, 2);
  recomputed([&](const at::Tensor& input) { return input.matmul(weight); }, x, {weight}).sum().backward();
  EXPECT_LT(relative_error(weight.grad(), x.sum(0).unsqueeze(1).expand({3, 3})), 1e-14);
}

/// Output and gradients of all weights, with and without keeping activations. Gradients are taken when the pass is
/// over.
void expect_same_bits(Backbone& model, const std::function<at::Tensor()>& output) {
  const NamedTensors weights = model.make_trainable();
  std::vector<at::Tensor> gradients, outputs;
  for (const bool recompute : {false, true}) {
    at::Tensor y;
    {
      const PassScope scope(model, {.training = true, .step = 1, .recompute = recompute});
      y = output();
    }
    // As training does: of the weights alone, and of those that the pass did not use as well.
    std::vector<at::Tensor> wanted;
    for (const auto& [name, weight] : weights) wanted.push_back(weight);
    y.pow(2).sum().backward({}, std::nullopt, false, wanted);
    outputs.push_back(y.detach());
    for (size_t i = 0; i < weights.size(); ++i) {
      at::Tensor weight = weights[i].second;
      if (recompute) {
        ASSERT_EQ(weight.grad().defined(), gradients[i].defined()) << weights[i].first;
        EXPECT_TRUE(!weight.grad().defined() || same_bits(weight.grad(), gradients[i])) << weights[i].first;
      } else {
        gradients.push_back(weight.grad());
      }
      weight.mutable_grad() = at::Tensor();
    }
  }
  EXPECT_TRUE(same_bits(outputs[0], outputs[1]));
}

TEST(Recompute, OfEveryFamilyChangesNoBit) {
  Decoder decoder = Decoder::from_config(tiny_config(DecoderConfig::Family::kOlmo2), 1, at::kFloat);
  const at::Tensor tokens = random_tokens(2, 6, decoder.config().vocab_size, 4);
  expect_same_bits(decoder, [&] { return decoder.forward(tokens); });
  BertConfig text;
  text.vocab_size = 40, text.hidden_size = 8, text.intermediate_size = 12, text.num_layers = 2, text.num_heads = 2;
  Bert bert = Bert::from_config(text, 2, at::kFloat);
  expect_same_bits(bert, [&] { return bert.features({.tokens = tokens}); });
  VitConfig images;
  images.hidden_size = 8, images.intermediate_size = 12, images.num_layers = 2, images.num_heads = 2;
  images.image_size = 8, images.patch_size = 4, images.num_channels = 1;
  Vit vit = Vit::from_config(images, 3, at::kFloat);
  const at::Tensor pixels = random_tensor({2, 1, 8, 8}, 5).to(at::kFloat);
  expect_same_bits(vit, [&] { return vit.features(pixels); });
}

}  // namespace
}  // namespace moraine::models
