#include "algorithms/adapters/matryoshka.h"

#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "algorithms/adapters/lora.h"
#include "core/error.h"
#include "core/file.h"
#include "tests/algorithms/adapter_cases.h"
#include "tests/models/random_tensors.h"
#include "tests/temporary_directory.h"

namespace moraine::algorithms::adapters {
namespace {

using Ranks = std::vector<int64_t>;

AdapterConfig matryoshka_of(int64_t rank, core::Json options = core::Json::object()) {
  AdapterConfig config;
  config.type = "matryoshka";
  config.rank = rank;
  config.alpha = 1;
  config.use_rslora = true;
  config.options = std::move(options);
  return config;
}

/// The slot's function by itself, its tensors and what they are multiplied by.
struct OneSlot {
  OneSlot(const AdapterConfig& config, int64_t in, int64_t out)
      : adapter(Adapter::create(config, std::vector<models::Slot>{{"slot", models::SlotKind::kLinear, in, out}}, 1,
                                at::kCPU)),
        function(const_cast<SlotAdapter&>(adapter.function(0))) {
    base.weight = at::zeros({out, in}, at::kDouble);
    adapter.parameters()[0].second.set_data(models::random_tensor({config.rank, in}, 1));
    adapter.parameters()[1].second.set_data(models::random_tensor({out, config.rank}, 2));
  }
  at::Tensor a() const { return adapter.parameters()[0].second; }
  at::Tensor b() const { return adapter.parameters()[1].second; }
  at::Tensor change(const at::Tensor& x, bool training) { return function.forward(x, base, {.training = training}); }
  Adapter adapter;
  SlotAdapter& function;
  models::SlotBase base;
};

TEST(Matryoshka, CountsAreThoseOfThePaper) {
  const auto llama_1b = decoder_slots(16, 2048, 512, 8192), llama_8b = decoder_slots(32, 4096, 1024, 14336);
  EXPECT_EQ(count_of(matryoshka_of(32), llama_1b).trained, 22'544'384);
  EXPECT_EQ(count_of(matryoshka_of(256), llama_1b).stored, 180'355'072);
  EXPECT_EQ(count_of(matryoshka_of(32), llama_8b).trained, 83'886'080);
  EXPECT_EQ(count_of(matryoshka_of(256), llama_8b).stored, 671'088'640);
}

TEST(Matryoshka, KeepsWhatEveryTypeOwes) {
  const models::Decoder base = golden_base();
  for (const bool as_trained : {false, true}) {
    const AdapterConfig config = matryoshka_of(6, {{"as_trained", as_trained}});
    expect_zero_at_init(config);
    expect_gradients(config, base, {"lora_A.weight"});
    expect_merge_is_forward(config, base);
    expect_round_trip(config, base);
    expect_depends_on_seed(config, true);
  }
}

TEST(Matryoshka, WeightsAreThoseOfTheExample) {
  const std::vector<double> weights = matryoshka_weights({1, 2, 4, 8}, 8, true);
  const std::vector<double> expected = {2.5607, 1.5607, .8536, .8536, .3536, .3536, .3536, .3536};
  // Four digits are given; weights are multiples of s_8.
  for (size_t i = 0; i < 8; ++i) EXPECT_NEAR(weights[i] / std::sqrt(8.0), expected[i], 5e-5) << i;
}

TEST(Matryoshka, WeightsFallAreZeroBehindTheLargestRankAndSumToTheRanksTimesTheirScales) {
  for (const bool use_rslora : {false, true}) {
    for (const Ranks& ranks : {Ranks{1, 2, 4, 8}, Ranks{3}, Ranks{7, 2, 5}, Ranks{9}}) {
      const std::vector<double> weights = matryoshka_weights(ranks, 9, use_rslora);
      double sum = 0;
      for (const int64_t r : ranks) sum += static_cast<double>(r) * scale_of(1, r, use_rslora);
      sum /= scale_of(1, 9, use_rslora);
      EXPECT_NEAR(std::accumulate(weights.begin(), weights.end(), 0.0), sum, 1e-12 * sum);
      for (size_t i = 0; i < 9; ++i) {
        EXPECT_EQ(weights[i] == 0, static_cast<int64_t>(i) >= std::ranges::max(ranks)) << i;
        EXPECT_LE(weights[i], weights[i > 0 ? i - 1 : 0]);
      }
    }
  }
}

TEST(Matryoshka, TrainsTheSumOverAllRanks) {
  for (const bool use_rslora : {false, true}) {
    for (const Ranks& ranks : {Ranks{}, Ranks{1, 3, 6}, Ranks{5}}) {
      AdapterConfig config = matryoshka_of(6, {{"ranks", ranks}});
      config.use_rslora = use_rslora;
      config.alpha = 3;
      OneSlot slot(config, 11, 7);
      const at::Tensor x = models::random_tensor({4, 11}, 3);
      at::Tensor sum = at::zeros({4, 7}, at::kDouble);
      for (const int64_t r : ranks.empty() ? Ranks{1, 2, 4, 6} : ranks)
        sum = sum + at::matmul(at::matmul(x, slot.a().narrow(0, 0, r).t()), slot.b().narrow(1, 0, r).t()) *
                        scale_of(3, r, use_rslora);
      // Weights are kept in float32: each is off by up to 2^-24 of itself.
      EXPECT_LE(models::relative_error(slot.change(x, true), sum), 1e-6);
      const at::Tensor deployed = at::matmul(at::matmul(x, slot.a().t()), slot.b().t()) * scale_of(3, 6, use_rslora);
      EXPECT_LE(models::relative_error(slot.change(x, false), deployed), 1e-12);
    }
  }
}

TEST(Matryoshka, WithItsFullRankAloneItTrainsAsLoraBitForBit) {
  const auto gradients = [](const AdapterConfig& config) {
    models::Decoder model = golden_base();
    const Adapter adapter = trained_adapter(config, model);
    adapter.attach(model);
    const models::PassScope scope(model, {.training = true});
    model.loss(golden_tensor("tokens")).sum.backward();
    models::NamedTensors all;
    for (const auto& [name, tensor] : adapter.parameters()) all.emplace_back(name, tensor.grad());
    return all;
  };
  const AdapterConfig nested = matryoshka_of(5, {{"ranks", {5}}, {"wide_start", false}});
  AdapterConfig plain = nested;
  plain.type = "lora";
  plain.options = core::Json::object();
  const auto first = gradients(nested), second = gradients(plain);
  for (size_t i = 0; i < first.size(); ++i) EXPECT_TRUE(at::equal(first[i].second, second[i].second)) << first[i].first;
}

TEST(Matryoshka, GradientsOfEqualRanksAreAsTheirWeights) {
  OneSlot slot(matryoshka_of(4, {{"ranks", {1, 3}}}), 5, 6);
  slot.a().set_data(models::random_tensor({1, 5}, 1).repeat({4, 1}));
  slot.b().set_data(models::random_tensor({6, 1}, 2).repeat({1, 4}));
  slot.change(models::random_tensor({3, 5}, 3), true).square().sum().backward();
  const std::vector<double> weights = matryoshka_weights({1, 3}, 4, true);
  for (int64_t i = 1; i < 4; ++i) {
    const double ratio = weights[static_cast<size_t>(i)] / weights[0];
    const at::Tensor a = slot.a().grad(), b = slot.b().grad();
    // Weights in float32.
    EXPECT_LE((a.select(0, i) - a.select(0, 0) * ratio).abs().max().item<double>(),
              1e-6 * a.abs().max().item<double>());
    EXPECT_LE((b.select(1, i) - b.select(1, 0) * ratio).abs().max().item<double>(),
              1e-6 * b.abs().max().item<double>());
  }
  EXPECT_EQ(slot.a().grad().select(0, 3).abs().max().item<double>(), 0) << "behind the largest rank";
}

TEST(Matryoshka, TruncatedReadsNothingBehindItsRank) {
  models::Decoder model = golden_base();
  const Adapter adapter = trained_adapter(matryoshka_of(6), model);
  const at::NoGradGuard no_grad;
  for (auto [name, tensor] : adapter.parameters())
    tensor.narrow(name.ends_with("lora_A.weight") ? 0 : 1, 3, 3).fill_(std::numeric_limits<double>::quiet_NaN());
  const Adapter cut = adapter.truncated(3, model);
  EXPECT_EQ(cut.targets()[0].scale, 1 / std::sqrt(3.0));
  cut.attach(model);
  EXPECT_TRUE(at::isfinite(model.forward(golden_tensor("tokens"))).all().item<bool>());
}

TEST(Matryoshka, IsWrittenAsTheLoraItIsUsedAs) {
  for (const bool as_trained : {false, true}) {
    const TemporaryDirectory directory;
    models::Decoder model = golden_base();
    const Adapter adapter = trained_adapter(matryoshka_of(6, {{"as_trained", as_trained}}), model);
    adapter.save(directory.path());
    const Adapter read = Adapter::load(directory.path(), model, std::nullopt, at::kCPU);
    adapter.attach(model);
    const at::Tensor expected = model.forward(golden_tensor("tokens"));
    adapter.detach(model);
    read.attach(model);
    EXPECT_TRUE(at::equal(model.forward(golden_tensor("tokens")), expected));
    const core::Json written = core::read_json(directory / "adapter_config.json");
    EXPECT_EQ(written.at("lora_alpha"), 1);
    EXPECT_EQ(written.at("use_rslora"), true);
  }
}

TEST(Matryoshka, StartsAsWideAsTheAuthorsCode) {
  for (const bool wide_start : {false, true}) {
    const std::vector<models::Slot> slots = {{"slot", models::SlotKind::kLinear, 400, 8}};
    const Adapter adapter = Adapter::create(matryoshka_of(4, {{"wide_start", wide_start}}), slots, 1, at::kCPU);
    const double bound = wide_start ? 1 / std::sqrt(4.0) : 1 / std::sqrt(400.0);
    const double largest = adapter.parameters()[0].second.abs().max().item<double>();
    EXPECT_LE(largest, bound * (1 + 1e-6));
    EXPECT_GT(largest, 0.99 * bound) << "the largest of 1600 is below with probability 1e-7";
  }
}

TEST(Matryoshka, RefusesWhatItCannotDo) {
  for (const core::Json& ranks : {core::Json{0}, core::Json{9}, core::Json{2, 2}, core::Json{"two"}, core::Json{1.5}})
    expect_refused({{"type", "matryoshka"}, {"options", {{"ranks", ranks}}}},
                   "different whole numbers in 1 .. rank = 8");
  expect_refused({{"type", "matryoshka"}, {"init", "olora"}}, "starts at B = 0");
  expect_refused({{"type", "matryoshka"}, {"rank_pattern", {{{"module", "q_proj"}, {"rank", 2}}}}},
                 "leave rank_pattern out");
}

}  // namespace
}  // namespace moraine::algorithms::adapters
