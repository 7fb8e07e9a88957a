#include "algorithms/flexmore/experts.h"

#include <algorithm>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/matmul.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "algorithms/flexmore/phlora.h"
#include "core/error.h"
#include "tests/models/random_tensors.h"

namespace moraine::algorithms::flexmore {
namespace {

using models::DecoderConfig;

// A dense model and experts of it: full-size ones are the public FFN plus noise, low-rank ones their extraction.
struct World {
  models::Decoder base =
      models::Decoder::from_config(models::tiny_config(DecoderConfig::Family::kOlmo2), 1, at::kFloat);
  std::vector<at::Tensor> public_rows;
  core::Json fingerprint;

  World() {
    for (int64_t l = 0; l < base.config().num_layers; ++l)
      public_rows.push_back(
          models::random_tensor({base.config().hidden_size}, 100 + static_cast<uint64_t>(l), 0.3).to(at::kFloat));
    fingerprint = fingerprint_of_base(base.weights(), public_rows);
  }

  Expert full(const std::string& name, uint64_t seed) const {
    Expert expert{name, {}, {}, {}};
    for (size_t l = 0; l < public_rows.size(); ++l) {
      const auto& frozen = base.base(ffn_slot(l));
      const auto noisy = [&](const at::Tensor& weight) {
        return weight + models::random_tensor(weight.sizes().vec(), ++seed, 0.2).to(at::kFloat);
      };
      expert.layers.push_back({noisy(frozen.gate), noisy(frozen.up), noisy(frozen.down), {}, {}, {}});
      expert.router_rows.push_back(models::random_tensor({base.config().hidden_size}, ++seed, 0.3).to(at::kFloat));
    }
    return expert;
  }

  Expert low_rank(Expert expert, int64_t rank) const {
    for (size_t l = 0; l < expert.layers.size(); ++l) {
      auto& ffn = expert.layers[l];
      const auto& frozen = base.base(ffn_slot(l));
      ffn.gate_delta = low_rank_of(spectrum_of_difference(ffn.gate, frozen.gate), rank);
      ffn.up_delta = low_rank_of(spectrum_of_difference(ffn.up, frozen.up), rank);
      ffn.down_delta = low_rank_of(spectrum_of_difference(ffn.down, frozen.down), rank);
      ffn.gate = ffn.up = ffn.down = at::Tensor();
    }
    return expert;
  }

  core::ArtefactPtr submit(const Expert& expert) const { return write_expert(expert, {{"base_tensors", fingerprint}}); }

  at::Tensor logits(const Mixture& mixture, int64_t top_k) const {
    const at::NoGradGuard no_grad;
    auto model = base.share();
    attach(model, mixture, {.top_k = top_k});
    return model.forward(models::random_tokens(2, 7, base.config().vocab_size, 5));
  }
};

TEST(Merge, DoesNotDependOnTheOrderOfSubmissions) {
  const World world;
  std::vector<core::ArtefactPtr> parts = {world.submit(world.full("b", 1)),
                                          world.submit(world.low_rank(world.full("a", 50), 3)),
                                          world.submit(world.low_rank(world.full("c", 90), 2))};
  const std::string id = write_mixture(merge(parts, {0, 0, 0}, world.public_rows, world.fingerprint), {})->id();
  std::sort(parts.begin(), parts.end());
  do {
    EXPECT_EQ(write_mixture(merge(parts, {0, 0, 0}, world.public_rows, world.fingerprint), {})->id(), id);
  } while (std::next_permutation(parts.begin(), parts.end()));
}

TEST(Merge, RefusesByNameTensorsThatDifferFromThePublicModel) {
  const World world;
  World other;
  other.fingerprint["model.layers.1.self_attn.q_proj.weight"] = "someone re-saved it";
  const auto message = models::thrown<core::UserError>([&] {
    merge({world.submit(world.full("a", 1)), other.submit(world.full("b", 2))}, {0, 0}, world.public_rows,
          world.fingerprint);
  });
  EXPECT_THAT(message, testing::HasSubstr("expert 'b'"));
  EXPECT_THAT(message, testing::HasSubstr("model.layers.1.self_attn.q_proj.weight"));
  EXPECT_THAT(message, testing::Not(testing::HasSubstr("k_proj")));
}

TEST(Merge, RefusesTwoExpertsOfOneName) {
  const World world;
  EXPECT_THROW(merge({world.submit(world.full("a", 1)), world.submit(world.full("a", 2))}, {0, 0}, world.public_rows,
                     world.fingerprint),
               core::UserError);
}

TEST(Merge, SlicesToTheRankAskedForAndNotAbove) {
  const World world;
  const Expert wide = world.low_rank(world.full("a", 7), 4);
  const auto mixture = merge({world.submit(wide)}, {2}, world.public_rows, world.fingerprint);
  EXPECT_EQ(mixture.experts[0].rank(), 2);
  EXPECT_TRUE(models::same_bits(mixture.experts[0].layers[0].up_delta.a,
                                wide.layers[0].up_delta.a.narrow(0, 0, 2).contiguous()));
  EXPECT_THROW(merge({world.submit(wide)}, {5}, world.public_rows, world.fingerprint), core::UserError);
  EXPECT_THROW(merge({world.submit(world.full("b", 9))}, {2}, world.public_rows, world.fingerprint), core::UserError);
}

TEST(Mixture, SurvivesItsArtefactBitForBit) {
  const World world;
  Expert biased = world.low_rank(world.full("a", 3), 2), also = world.full("b", 30);
  for (size_t l = 0; l < world.public_rows.size(); ++l) {
    biased.biases.push_back(models::random_tensor({1}, l + 1).to(at::kFloat).neg().abs().neg());
    also.biases.push_back(models::random_tensor({1}, l + 9).to(at::kFloat).abs().neg());
  }
  const Mixture mixture{world.public_rows, {biased, also}};
  const auto artefact = write_mixture(mixture, {});
  EXPECT_EQ(artefact->meta().at("expert_ranks"), (core::Json{0, 2, 0}));
  EXPECT_EQ(write_mixture(read_mixture(*artefact), {})->id(), artefact->id());
  EXPECT_TRUE(models::same_bits(world.logits(read_mixture(*artefact), 2), world.logits(mixture, 2)));
}

// Check 2 of FlexMoRE: at full rank the corrected public FFN is the expert.
TEST(Mixture, ExtractionAtFullRankGivesTheFullExpertsLogits) {
  const World world;
  const Expert full = world.full("a", 11);
  const Expert cut =
      world.low_rank(full, std::min(world.base.config().hidden_size, world.base.config().intermediate_size));
  // float32: SVD and re-multiplication lose about 1e-6 of each weight, amplified by two layers of unit-scale weights
  EXPECT_LT(
      models::relative_error(world.logits({world.public_rows, {cut}}, 2), world.logits({world.public_rows, {full}}, 2)),
      1e-4);
}

TEST(Soup, OfEqualExpertsIsTheExpertAndOfTwoIsTheirMean) {
  const World world;
  const Expert a = world.full("a", 1), b = world.full("b", 2);
  const auto same = soup({a, a, a});
  EXPECT_LT(models::relative_error(same[0].gate, a.layers[0].gate), 1e-7);  // one float32 rounding
  const auto mean = soup({a, b});
  EXPECT_LT(
      models::relative_error(mean[1].down, (a.layers[1].down.to(at::kDouble) + b.layers[1].down.to(at::kDouble)) / 2),
      1e-7);
  EXPECT_THROW(soup({world.low_rank(a, 2)}), core::UserError);
}

TEST(Expert, CountsItsParameters) {
  const World world;
  const auto& config = world.base.config();
  EXPECT_EQ(world.full("a", 1).parameters(), config.ffn_parameters() + config.router_parameters(1));
  EXPECT_EQ(world.low_rank(world.full("a", 1), 3).parameters(),
            config.low_rank_parameters(3) + config.router_parameters(1));
}

// A shipped expert says of itself how it is called and how many layers it has.
TEST(Experts, MetadataOfAFileIsNotBelieved) {
  World world;
  const auto good = world.submit(world.full("a", 1));
  const auto complaint = [&](const char* key, const core::Json& value) {
    core::Json meta = good->meta();
    meta[key] = value;
    const auto changed = core::Artefact::create("expert", meta, good->file().tensors());
    return models::thrown<core::UserError>([&] { merge({changed}, {0}, world.public_rows, world.fingerprint); });
  };
  EXPECT_EQ(complaint("layers", good->meta().at("layers")), "");
  EXPECT_THAT(complaint("layers", 1), testing::HasSubstr("has 1 layers, the public model 2"));
  for (const core::Json& layers :
       {core::Json(0), core::Json(-1), core::Json(1000000000), core::Json("2"), core::Json()})
    EXPECT_NE(complaint("layers", layers), "") << layers.dump();
  EXPECT_NE(complaint("rank", 2), "");
  EXPECT_THAT(complaint("name", "../../x"), testing::HasSubstr("cannot be a file name"));
  EXPECT_THAT(complaint("name", 7), testing::HasSubstr("'name' is missing or of another type"));
}

TEST(Experts, MetadataOfAMixtureIsNotBelieved) {
  World world;
  const auto good =
      write_mixture(merge({world.submit(world.full("a", 1))}, {0}, world.public_rows, world.fingerprint), {});
  const auto complaint = [&](const char* key, const core::Json& value) {
    core::Json meta = good->meta();
    meta[key] = value;
    const auto changed = core::Artefact::create("mixture", meta, good->file().tensors());
    return models::thrown<core::UserError>([&] { attach(world.base, read_mixture(*changed), {}); });
  };
  EXPECT_THAT(complaint("layers", 1), testing::HasSubstr("a mixture of 1 layers on a public model of 2"));
  EXPECT_THAT(complaint("expert_ranks", core::Json::array({0})), testing::HasSubstr("1 ranks for 1 experts"));
  EXPECT_NE(complaint("experts", core::Json::array({"a", "b"})), "");
  EXPECT_NE(complaint("layers", 1000000), "");
  EXPECT_EQ(complaint("layers", 2), "");
}

}  // namespace
}  // namespace moraine::algorithms::flexmore
