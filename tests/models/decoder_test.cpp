#include "models/decoder.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include <ATen/TensorOperators.h>
#include <ATen/ops/log_softmax.h>

#include "core/error.h"
#include "models/mixture.h"
#include "tests/models/random_tensors.h"

namespace moraine::models {
namespace {

using Family = DecoderConfig::Family;
using testing::HasSubstr;

/// Multiplies the frozen function by a factor, or feature by feature.
class Scaled : public SlotFunction {
 public:
  explicit Scaled(at::Tensor factor) : factor_(std::move(factor)) {}
  at::Tensor forward(const at::Tensor& x, const SlotBase& base, const Pass&) override {
    return base.forward(x) * factor_;
  }
  NamedTensors parameters() const override { return {{"factor", factor_}}; }

 private:
  at::Tensor factor_;
};

std::shared_ptr<Scaled> scaled_by(double factor) {
  return std::make_shared<Scaled>(random_tensor({1}, 1).fill_(factor).to(at::kFloat).set_requires_grad(true));
}

/// Tilts the output: norms behind a slot remove a common factor.
std::shared_ptr<Scaled> tilted(const Slot& slot) {
  return std::make_shared<Scaled>(random_tensor({slot.out}, 5, 0.3).add_(1).to(at::kFloat));
}

const at::Tensor kTokens = random_tokens(2, 9, 40, 2);

class EveryFamily : public testing::TestWithParam<Family> {
 protected:
  Decoder decoder_ = Decoder::from_config(tiny_config(GetParam()), 7, at::kFloat);
};
INSTANTIATE_TEST_SUITE_P(Decoder, EveryFamily,
                         testing::Values(Family::kLlama, Family::kOlmo2, Family::kFlexOlmo, Family::kFlexMore),
                         [](const auto& test) { return std::string(tiny_config(test.param).to_json()["model_type"]); });

TEST_P(EveryFamily, EverySlotChangesTheLogitsAndDetachRestoresEveryBit) {
  const at::Tensor plain = decoder_.forward(kTokens);
  EXPECT_EQ(decoder_.slots().size(), decoder_.config().is_mixture() ? 13u : 19u);
  for (const Slot& slot : decoder_.slots()) {
    const auto before = decoder_.attached(slot.path);
    EXPECT_EQ(before != nullptr, decoder_.config().is_mixture() && slot.kind == SlotKind::kFfn) << slot.path;
    decoder_.detach(slot.path);
    decoder_.attach(slot.path, tilted(slot));
    EXPECT_GT(relative_error(decoder_.forward(kTokens), plain), 1e-4) << slot.path;
    decoder_.detach(slot.path);
    if (before) decoder_.attach(slot.path, before);
    EXPECT_TRUE(same_bits(decoder_.forward(kTokens), plain)) << slot.path;
  }
}

TEST_P(EveryFamily, AFunctionThatIsTheBaseChangesNoBit) {
  Decoder dense = Decoder::from_config(tiny_config(GetParam()), 7, at::kFloat);
  for (const Slot& slot : dense.slots()) {
    if (slot.kind == SlotKind::kFfn) dense.detach(slot.path);
  }
  const at::Tensor plain = dense.forward(kTokens);
  for (const Slot& slot : dense.slots()) {
    dense.attach(slot.path, scaled_by(1.0));
    EXPECT_TRUE(same_bits(dense.forward(kTokens), plain)) << slot.path;
    dense.detach(slot.path);
  }
}

TEST_P(EveryFamily, SlotShapesAreThoseOfTheirWeights) {
  for (const Slot& slot : decoder_.slots()) {
    const SlotBase& base = decoder_.base(slot.path);
    if (slot.kind == SlotKind::kLinear) {
      EXPECT_EQ(base.weight.sizes(), (Shape{slot.out, slot.in})) << slot.path;
    } else if (slot.kind == SlotKind::kBlock) {
      EXPECT_FALSE(base.weight.defined() || base.gate.defined()) << slot.path;
      EXPECT_EQ(slot.in, slot.out) << slot.path;
    } else {
      EXPECT_EQ(base.gate.sizes(), (Shape{slot.inner, slot.in})) << slot.path;
      EXPECT_EQ(base.up.sizes(), (Shape{slot.inner, slot.in})) << slot.path;
      EXPECT_EQ(base.down.sizes(), (Shape{slot.out, slot.inner})) << slot.path;
    }
  }
}

TEST_P(EveryFamily, TrainingASlotLeavesTheFrozenWeightsWithoutGradients) {
  const auto function = scaled_by(1.0);
  decoder_.attach("model.layers.0.self_attn.q_proj", function);
  decoder_.loss(kTokens).sum.backward();
  EXPECT_TRUE(function->parameters()[0].second.grad().defined());
  for (const auto& [name, weight] : decoder_.weights()) {
    EXPECT_FALSE(weight.requires_grad()) << name;
    EXPECT_FALSE(weight.grad().defined()) << name;
  }
}

TEST_P(EveryFamily, FfnInputsAreWhatTheFfnSlotSees) {
  class Recorder : public SlotFunction {
   public:
    at::Tensor forward(const at::Tensor& x, const SlotBase& base, const Pass&) override {
      seen = x;
      return base.forward(x);
    }
    NamedTensors parameters() const override { return {}; }
    at::Tensor seen;
  };
  std::vector<std::shared_ptr<Recorder>> recorders;
  for (int64_t layer = 0; layer < 2; ++layer) {
    recorders.push_back(std::make_shared<Recorder>());
    decoder_.detach(layer_path(layer) + ".mlp");
    decoder_.attach(layer_path(layer) + ".mlp", recorders.back());
  }
  decoder_.forward(kTokens);
  const at::Tensor first = recorders[0]->seen, second = recorders[1]->seen;
  const std::vector<at::Tensor> inputs = decoder_.ffn_inputs(kTokens);
  ASSERT_EQ(inputs.size(), 2u);
  EXPECT_EQ(inputs[0].sizes(), (Shape{2, 9, 16}));
  EXPECT_TRUE(same_bits(inputs[0].flatten(0, 1), first));
  EXPECT_TRUE(same_bits(inputs[1].flatten(0, 1), second));
}

TEST_P(EveryFamily, MakeTrainableGivesEveryWeightALeafThatTheModelFollows) {
  const at::Tensor plain = decoder_.forward(kTokens);
  const Decoder frozen = decoder_.share();
  const NamedTensors leaves = decoder_.make_trainable();
  EXPECT_TRUE(same_bits(decoder_.forward(kTokens), plain));
  EXPECT_EQ(leaves.size(), expected_tensors(decoder_.config()).size());
  for (const auto& [name, leaf] : leaves) {
    EXPECT_TRUE(leaf.is_leaf() && leaf.requires_grad()) << name;
    if (name.ends_with("layers.1.mlp.gate.weight")) continue;  // a small step may leave the router's choice as it is
    const at::Tensor saved = leaf.detach().clone();
    leaf.detach().mul_(1.5).add_(0.5);
    EXPECT_GT(relative_error(decoder_.forward(kTokens), plain), 1e-5) << name;
    leaf.detach().copy_(saved);
  }
  EXPECT_TRUE(same_bits(Decoder(frozen.share()).forward(kTokens), plain));
}

TEST_P(EveryFamily, SharedModelsHaveTheirOwnSlots) {
  Decoder other = decoder_.share();
  const at::Tensor plain = decoder_.forward(kTokens);
  other.attach("lm_head", scaled_by(2.0));
  EXPECT_TRUE(same_bits(decoder_.forward(kTokens), plain));
  EXPECT_TRUE(same_bits(other.forward(kTokens), plain * 2));
  EXPECT_EQ(other.weights().at("model.norm.weight").const_data_ptr(),
            decoder_.weights().at("model.norm.weight").const_data_ptr());
}

TEST_P(EveryFamily, LaterTokensDoNotChangeEarlierLogits) {
  const at::Tensor whole = decoder_.forward(kTokens);
  EXPECT_LE(relative_error(decoder_.forward(kTokens.slice(1, 0, 5)), whole.slice(1, 0, 5)),
            1e-5);  // float32, other matrix shapes
}

TEST(DecoderSlots, UnknownPathNamesTheNearestOnes) {
  const Decoder decoder = Decoder::from_config(tiny_config(Family::kOlmo2), 7, at::kFloat);
  EXPECT_THAT(thrown<core::UserError>([&] { decoder.base("model.layers.1.mlp.down"); }),
              HasSubstr("model.layers.1.mlp.down_proj"));
}

TEST(DecoderSlots, ASlotTakesOneFunctionAndNoneInsideAnother) {
  Decoder decoder = Decoder::from_config(tiny_config(Family::kOlmo2), 7, at::kFloat);
  decoder.attach("model.layers.1.mlp", scaled_by(1.0));
  EXPECT_THROW(decoder.attach("model.layers.1.mlp", scaled_by(1.0)), core::InternalError);
  EXPECT_THAT(thrown<core::UserError>([&] { decoder.attach("model.layers.1.mlp.up_proj", scaled_by(1.0)); }),
              HasSubstr("'model.layers.1.mlp' is taken"));
  EXPECT_NO_THROW(decoder.attach("model.layers.0.mlp.up_proj", scaled_by(1.0)));
  EXPECT_THROW(decoder.attach("model.layers.0.mlp", scaled_by(1.0)), core::UserError);
}

TEST(DecoderBFloat16, TrainsFloat32MastersThroughBFloat16) {
  Decoder decoder = Decoder::from_config(tiny_config(Family::kOlmo2), 7, at::kBFloat16);
  const NamedTensors leaves = decoder.make_trainable();
  EXPECT_EQ(decoder.forward(kTokens).scalar_type(), at::kBFloat16);
  const TokenLoss loss = decoder.loss(kTokens);
  EXPECT_EQ(loss.sum.scalar_type(), at::kFloat);
  loss.sum.backward();
  for (const auto& [name, leaf] : leaves) EXPECT_EQ(leaf.grad().scalar_type(), at::kFloat) << name;
}

TEST(DecoderLoss, EqualsLogSoftmaxOverTheTargetsThatCount) {
  Decoder decoder = Decoder::from_config(tiny_config(Family::kOlmo2), 7, at::kFloat);
  at::Tensor padded = kTokens.clone();
  padded.slice(0, 1).slice(1, 6).fill_(-1);
  const TokenLoss loss = decoder.loss(padded, /*count_correct=*/true);
  const at::Tensor logits = decoder.forward(kTokens.slice(1, 0, -1));
  double expected = 0;
  int64_t count = 0, correct = 0;
  for (int64_t b = 0; b < 2; ++b) {
    for (int64_t t = 0; t < (b == 0 ? 8 : 5); ++t) {
      const int64_t target = kTokens[b][t + 1].item<int64_t>();
      expected -= at::log_softmax(logits[b][t].to(at::kDouble), -1)[target].item<double>();
      correct += logits[b][t].argmax().item<int64_t>() == target;
      ++count;
    }
  }
  EXPECT_EQ(loss.count, count);
  EXPECT_EQ(loss.correct, correct);
  EXPECT_NEAR(loss.sum.item<double>(), expected, 1e-5 * expected);  // float32 logits
}

TEST(DecoderLoss, ALargeVocabularyInPiecesGivesTheSameSum) {
  DecoderConfig config = tiny_config(Family::kOlmo2);
  config.vocab_size = int64_t{1} << 19;  // 32 rows of logits at a time
  config.hidden_size = 4, config.num_heads = config.num_kv_heads = 1, config.num_layers = 1;
  Decoder decoder = Decoder::from_config(config, 7, at::kFloat);
  const at::Tensor tokens = random_tokens(1, 41, config.vocab_size, 3);
  const at::Tensor all = at::log_softmax(decoder.forward(tokens.slice(1, 0, -1))[0], -1)
                             .gather(1, tokens[0].slice(0, 1).unsqueeze(1))
                             .to(at::kDouble);
  EXPECT_NEAR(decoder.loss(tokens).sum.item<double>(), -all.sum().item<double>(), 1e-4);
}

TEST(DecoderLoss, NothingToPredictIsZeroAndHarmless) {
  Decoder decoder = Decoder::from_config(tiny_config(Family::kOlmo2), 7, at::kFloat);
  const TokenLoss loss = decoder.loss(random_tokens(1, 4, 40, 1).fill_(-1), true);
  EXPECT_EQ(loss.count, 0);
  EXPECT_EQ(loss.correct, 0);
  EXPECT_EQ(loss.sum.item<double>(), 0.0);
}

TEST(DecoderTokens, OutsideTheVocabularyIsAUserError) {
  Decoder decoder = Decoder::from_config(tiny_config(Family::kOlmo2), 7, at::kFloat);
  EXPECT_THAT(thrown<core::UserError>([&] { decoder.forward(kTokens + 40); }), HasSubstr("vocabulary of 40"));
  EXPECT_THROW(decoder.forward(kTokens - 40), core::UserError);
}

// FlexMoRE, check 7: when all experts are the public one, y = (sum of p) F_0(x), and the post-norm removes the factor.
TEST(DecoderMixture, OfPublicExpertsIsTheDenseModel) {
  Decoder dense = Decoder::from_config(tiny_config(Family::kOlmo2), 7, at::kDouble);
  DecoderConfig config = tiny_config(Family::kFlexOlmo);
  Decoder mixture = Decoder::from_config(config, 8, at::kDouble);
  for (const auto& [name, weight] : mixture.weights()) {
    if (name.ends_with("mlp.gate.weight")) continue;
    std::string source = name;
    if (const size_t at = source.find(".experts."); at != std::string::npos)
      source.erase(at, std::string(".experts.0").size());
    weight.copy_(dense.weights().at(source));
  }
  const at::Tensor expected = dense.forward(kTokens);
  for (const int64_t top_k : {1, 2, 4}) {
    for (int64_t layer = 0; layer < 2; ++layer) {
      std::dynamic_pointer_cast<MixtureFfn>(mixture.attached(layer_path(layer) + ".mlp"))->set_top_k(top_k);
    }
    // k = E: the weights sum to one. Else eps = 1e-6 inside the norm meets the factor's square.
    EXPECT_LE(relative_error(mixture.forward(kTokens), expected), top_k == 4 ? 1e-13 : 1e-4) << "top_k " << top_k;
  }
}

// FlexMoRE, check 8: renormalising multiplies y by a positive factor, which the post-norm removes.
TEST(DecoderMixture, RenormalisedWeightsGiveTheSameModelUpToEpsilon) {
  DecoderConfig config = tiny_config(Family::kFlexMore);
  const at::Tensor plain = Decoder::from_config(config, 7, at::kDouble).forward(kTokens);
  config.norm_topk_prob = true;
  const at::Tensor renormalised = Decoder::from_config(config, 7, at::kDouble).forward(kTokens);
  EXPECT_LE(relative_error(renormalised, plain), 1e-4);
  EXPECT_FALSE(same_bits(renormalised, plain));
}

}  // namespace
}  // namespace moraine::models
