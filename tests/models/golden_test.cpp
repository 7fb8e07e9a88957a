// Logits, loss and gradients against transformers 4.57.6 (scripts/make_golden.py writes the files).
#include <gtest/gtest.h>

#include <ATen/TensorOperators.h>

#include "core/json.h"
#include "core/safetensors.h"
#include "models/decoder.h"
#include "models/tensor_io.h"
#include "tests/models/random_tensors.h"

namespace moraine::models {
namespace {

// The bar set for the decoders; float32 rounding over two layers of width 16 stays a few times below it.
constexpr double kTolerance = 1e-5;

class Golden : public testing::TestWithParam<const char*> {
 protected:
  Golden()
      : file_(core::Safetensors::open(std::string(MORAINE_SOURCE_DIR "/tests/models/golden/") + GetParam() +
                                      ".safetensors")) {}

  at::Tensor stored(const std::string& name) const { return copy_of(*file_.find(name)); }

  Decoder model(std::optional<at::ScalarType> dtype = std::nullopt) const {
    const DecoderConfig config =
        DecoderConfig::from_json(core::parse_json(file_.metadata().at("config"), "golden"), "golden");
    std::vector<core::TensorView> weights;
    for (core::TensorView view : file_.tensors()) {
      if (!view.name.starts_with("weight/")) continue;
      view.name = view.name.substr(std::string("weight/").size());
      weights.push_back(view);
    }
    return Decoder::from_tensors(config, weights, "golden", dtype);
  }

  core::Safetensors file_;
};

TEST_P(Golden, LogitsEqualTransformers) {
  Decoder decoder = model();
  const at::Tensor tokens = stored("tokens").slice(1, 0, -1);
  EXPECT_LE(relative_error(decoder.forward(tokens), stored("logits")), kTolerance);
}

TEST_P(Golden, LossEqualsTransformers) {
  Decoder decoder = model();
  const TokenLoss loss = decoder.loss(stored("tokens"));
  EXPECT_EQ(loss.count, stored("tokens").slice(1, 1).numel());
  EXPECT_LE(relative_error(loss.sum / static_cast<double>(loss.count), stored("loss")), kTolerance);
}

TEST_P(Golden, GradientsOfEveryWeightEqualTransformers) {
  Decoder decoder = model();
  const NamedTensors weights = decoder.make_trainable();
  const TokenLoss loss = decoder.loss(stored("tokens"));
  (loss.sum / static_cast<double>(loss.count)).backward();
  size_t compared = 0;
  for (const auto& [name, weight] : weights) {
    const core::TensorView* expected = file_.find("gradient/" + name);
    ASSERT_NE(expected, nullptr) << name;
    ASSERT_TRUE(weight.grad().defined()) << name;
    EXPECT_LE(relative_error(weight.grad(), copy_of(*expected)), kTolerance) << name;
    ++compared;
  }
  EXPECT_EQ(compared, expected_tensors(decoder.config()).size());
}

TEST_P(Golden, BFloat16StaysNearFloat32) {
  Decoder decoder = model(at::kBFloat16);
  const at::Tensor logits = decoder.forward(stored("tokens").slice(1, 0, -1));
  EXPECT_EQ(logits.scalar_type(), at::kBFloat16);
  // 8 bits of mantissa, some ten roundings in a row; a token of the mixtures may change its second expert, hence the
  // mean.
  const at::Tensor expected = stored("logits");
  const double mean_error = ((logits.to(at::kFloat) - expected).abs().mean() / expected.abs().mean()).item<double>();
  EXPECT_LT(mean_error, 0.05);
}

INSTANTIATE_TEST_SUITE_P(Families, Golden,
                         testing::Values("llama_gqa_biases", "llama_tied", "llama3_rope", "llama_linear_rope",
                                         "mistral", "mistral_window", "qwen2", "qwen2_window", "olmo2", "olmo2_gqa",
                                         "flexolmo", "flexolmo_renormalised"),
                         [](const auto& test) { return std::string(test.param); });

}  // namespace
}  // namespace moraine::models
