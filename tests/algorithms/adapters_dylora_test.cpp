#include "algorithms/adapters/dylora.h"

#include <map>
#include <vector>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/outer.h>
#include <gtest/gtest.h>

#include "algorithms/adapters/lora.h"
#include "core/error.h"
#include "core/file.h"
#include "tests/algorithms/adapter_cases.h"
#include "tests/models/random_tensors.h"
#include "tests/temporary_directory.h"

namespace moraine::algorithms::adapters {
namespace {

AdapterConfig dylora_of(int64_t rank, core::Json options = core::Json::object()) {
  AdapterConfig config;
  config.type = "dylora";
  config.rank = rank;
  config.alpha = 6;
  config.options = std::move(options);
  return config;
}

AdapterConfig lora_of(int64_t rank) {
  AdapterConfig config = dylora_of(rank);
  config.type = "lora";
  return config;
}

/// Loss and gradients of one training pass at a step, adapters of equal seeds.
struct Trained {
  at::Tensor loss;
  models::NamedTensors gradients;
};

Trained trained_at(const AdapterConfig& config, int64_t step, bool with_noise = true) {
  models::Decoder model = golden_base();
  const Adapter adapter = with_noise ? trained_adapter(config, model) : Adapter::create(config, model, 1, at::kCPU);
  adapter.attach(model);
  const models::PassScope scope(model, {.training = true, .step = step, .seed = 4});
  Trained result;
  result.loss = model.loss(golden_tensor("tokens")).sum;
  result.loss.backward();
  for (const auto& [name, tensor] : adapter.parameters()) result.gradients.emplace_back(name, tensor.grad());
  return result;
}

void expect_same_training(const AdapterConfig& first, const AdapterConfig& second) {
  for (int64_t step = 0; step < 4; ++step) {
    const Trained one = trained_at(first, step), other = trained_at(second, step);
    EXPECT_TRUE(at::equal(one.loss, other.loss));
    for (size_t i = 0; i < one.gradients.size(); ++i) {
      EXPECT_EQ(one.gradients[i].first, other.gradients[i].first);
      EXPECT_TRUE(at::equal(one.gradients[i].second, other.gradients[i].second)) << one.gradients[i].first;
    }
  }
}

TEST(Dylora, CountsAreThoseOfThePaper) {
  AdapterConfig config = dylora_of(8);
  config.target_modules = {"q_proj", "v_proj"};
  EXPECT_EQ(count_of(config, decoder_slots(12, 768, 768, 3072)).trained, 294'912);  // RoBERTa-base
  config.rank = 4;
  EXPECT_EQ(count_of(config, decoder_slots(24, 1024, 1024, 4096)).stored, 393'216);  // GPT-2 medium, 0.39M
}

TEST(Dylora, KeepsWhatEveryTypeOwes) {
  const models::Decoder base = golden_base();
  for (const bool frozen : {false, true}) {
    const AdapterConfig config = dylora_of(4, {{"frozen", frozen}});
    expect_zero_at_init(config);
    expect_gradients(config, base, {"lora_A.weight"});
    expect_merge_is_forward(config, base);
    expect_round_trip(config, base);
    expect_depends_on_seed(config, true);
  }
}

TEST(Dylora, RankOfAStepDependsOnSeedAndStepAloneAndIsUniform) {
  std::map<int64_t, int> drawn;
  for (int64_t step = 0; step < 6000; ++step) {
    const int64_t rank = dylora_rank({.training = true, .step = step, .first = 0, .seed = 7}, 3, 8);
    EXPECT_EQ(rank, dylora_rank({.training = true, .step = step, .first = 4, .seed = 7}, 3, 8)) << "a micro-batch";
    ++drawn[rank];
  }
  ASSERT_EQ(drawn.size(), 6u);
  EXPECT_EQ(drawn.begin()->first, 3);
  for (const auto& [rank, times] : drawn) EXPECT_NEAR(times, 1000, 5 * 29) << rank;  // 5 binomial deviations
  EXPECT_NE(dylora_rank({.step = 1, .seed = 7}, 1, 1'000'000), dylora_rank({.step = 1, .seed = 8}, 1, 1'000'000));
}

TEST(Dylora, AtFullRankOrRankOneItTrainsAsLoraBitForBit) {
  expect_same_training(dylora_of(4, {{"min_rank", 4}, {"frozen", false}}), lora_of(4));
  for (const bool frozen : {false, true}) expect_same_training(dylora_of(1, {{"frozen", frozen}}), lora_of(1));
}

TEST(Dylora, OnlyTheRanksOfTheStepReceiveAGradient) {
  for (const bool frozen : {false, true}) {
    for (int64_t step = 0; step < 6; ++step) {
      const int64_t rank = dylora_rank({.training = true, .step = step, .seed = 4}, 1, 5);
      for (const auto& [name, gradient] : trained_at(dylora_of(5, {{"frozen", frozen}}), step).gradients) {
        const int64_t dim = name.ends_with("lora_A.weight") ? 0 : 1;
        for (int64_t i = 0; i < 5; ++i) {
          const bool still = gradient.select(dim, i).abs().max().item<float>() == 0;
          EXPECT_EQ(still, i >= rank || (frozen && i < rank - 1)) << name << " " << i << " of " << rank;
        }
      }
    }
  }
}

TEST(Dylora, FrozenPrefixChangesGradientsButNotTheLoss) {
  for (int64_t step = 0; step < 4; ++step)
    EXPECT_TRUE(at::equal(trained_at(dylora_of(5, {{"frozen", true}}), step).loss,
                          trained_at(dylora_of(5, {{"frozen", false}}), step).loss));
}

TEST(Dylora, TruncatedIsALoraOfTheFirstRanksAtAlphaOverThatRank) {
  models::Decoder model = golden_base();
  const Adapter adapter = trained_adapter(dylora_of(5), model);
  const at::Tensor tokens = golden_tensor("tokens");
  for (int64_t step = 0; step < 6; ++step) {
    const models::Pass pass{.training = true, .step = step, .seed = 4};
    const int64_t rank = dylora_rank(pass, 1, 5);
    adapter.attach(model);
    const at::Tensor trained = [&] {
      const models::PassScope scope(model, pass);
      return model.forward(tokens);
    }();
    adapter.detach(model);
    const Adapter cut = adapter.truncated(rank, model);
    EXPECT_EQ(cut.config().type, "lora");
    EXPECT_EQ(cut.targets()[0].scale, 6.0 / static_cast<double>(rank));
    cut.attach(model);
    EXPECT_TRUE(at::equal(model.forward(tokens), trained)) << rank;
    cut.detach(model);
  }
}

TEST(Dylora, NeighbouringRanksDifferByOneOuterProduct) {
  const models::Decoder model = golden_base();
  const Adapter adapter = trained_adapter(dylora_of(5), model);
  const at::NoGradGuard no_grad;
  const auto product = [&](int64_t rank) {
    return adapter.truncated(rank, model).function(0).delta({})->to(at::kDouble) * (static_cast<double>(rank) / 6);
  };
  const std::string path = adapter.targets()[0].slot.path;
  const auto of = [&](const std::string& name) {
    for (const auto& [key, tensor] : adapter.parameters())
      if (key == path + name) return tensor;
    return at::Tensor();
  };
  for (int64_t rank = 2; rank <= 5; ++rank)
    expect_close(product(rank) - product(rank - 1),
                 at::outer(of(".lora_B.weight").select(1, rank - 1), of(".lora_A.weight").select(0, rank - 1)),
                 std::to_string(rank));
}

TEST(Dylora, EveryRankIsWrittenAsALoraThatPeftReads) {
  const TemporaryDirectory directory;
  models::Decoder model = golden_base();
  const Adapter adapter = trained_adapter(dylora_of(5), model);
  for (const int64_t rank : {2, 5}) {
    const auto path = directory / std::to_string(rank);
    const Adapter whole_or_cut = adapter.truncated(rank, model);
    (rank == 5 ? adapter : whole_or_cut).save(path);
    const core::Json written = core::read_json(path / "adapter_config.json");
    EXPECT_EQ(written.at("r"), rank);
    EXPECT_EQ(written.at("lora_alpha"), 6);
    whole_or_cut.attach(model);
    const at::Tensor expected = model.forward(golden_tensor("tokens"));
    whole_or_cut.detach(model);
    const Adapter read = Adapter::load(path, model, std::nullopt, at::kCPU);
    read.attach(model);
    EXPECT_TRUE(at::equal(model.forward(golden_tensor("tokens")), expected));
    read.detach(model);
  }
}

TEST(Dylora, RefusesWhatItCannotDo) {
  expect_refused({{"type", "dylora"}, {"options", {{"min_rank", 9}}}}, "options.min_rank: 9 is not in 1 .. rank = 8");
  expect_refused({{"type", "dylora"}, {"options", {{"min_rank", 0}}}}, "options.min_rank");
  expect_refused({{"type", "dylora"}, {"init", "pissa"}}, "starts at B = 0");
  expect_refused({{"type", "dylora"}, {"rank_pattern", {{{"module", "q_proj"}, {"rank", 2}}}}},
                 "leave rank_pattern out");
  const models::Decoder model = golden_base();
  const Adapter nested = trained_adapter(dylora_of(4), model), plain = trained_adapter(lora_of(4), model);
  for (const int64_t rank : {0, 5}) {
    EXPECT_THROW(nested.truncated(rank, model), core::UserError);
    EXPECT_THROW(plain.truncated(rank, model), core::UserError);
  }
  AdapterConfig pissa = lora_of(4);
  pissa.init = "pissa";
  EXPECT_THROW(trained_adapter(pissa, model).truncated(2, model), core::UserError);
}

TEST(Lora, CutKeepsItsFirstPairsAtTheStrengthTheyHave) {
  const models::Decoder model = golden_base();
  for (const bool rslora : {false, true}) {
    AdapterConfig config = lora_of(4);
    config.use_rslora = rslora;
    const Adapter whole = trained_adapter(config, model), cut = whole.truncated(1, model);
    const auto product = [&](const Adapter& adapter) {
      const models::NamedTensors pair = adapter.function(0).parameters();
      return at::matmul(pair[1].second.narrow(1, 0, 1).to(at::kDouble),
                        pair[0].second.narrow(0, 0, 1).to(at::kDouble)) *
             adapter.targets()[0].scale;
    };
    EXPECT_LT(models::relative_error(cut.function(0).delta({})->to(at::kDouble), product(whole)), 1e-6);
    EXPECT_EQ(cut.function(0).parameters()[0].second.size(0), 1);
  }
}

}  // namespace
}  // namespace moraine::algorithms::adapters
