#include "algorithms/adapters/nola.h"

#include <cmath>
#include <vector>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/matmul.h>
#include <gtest/gtest.h>

#include "algorithms/adapters/lora.h"
#include "core/file.h"
#include "tests/algorithms/adapter_cases.h"
#include "tests/models/random_tensors.h"
#include "tests/temporary_directory.h"

namespace moraine::algorithms::adapters {
namespace {

AdapterConfig nola_of(int64_t rank, int64_t bases) {
  AdapterConfig config;
  config.type = "nola";
  config.rank = rank;
  config.options = {{"bases", bases}};
  return config;
}

/// All bases of a seed as rows of one matrix, drawn at once.
at::Tensor materialised(int64_t count, int64_t size, uint64_t seed) {
  const double bound = 1 / std::sqrt(static_cast<double>(count));
  at::Tensor bases = at::empty({count, size}, at::kFloat);
  return bases.uniform_(-bound, bound, at::detail::createCPUGenerator(seed)).to(at::kDouble);
}

TEST(Nola, CountsAreThoseOfThePaper) {
  AdapterConfig config = nola_of(8, 1000);
  config.target_modules = {"q_proj", "v_proj"};
  const auto gpt2_medium = decoder_slots(24, 1024, 1024, 4096), gpt2_large = decoder_slots(36, 1280, 1280, 5120);
  EXPECT_EQ(count_of(config, gpt2_medium).trained, 96'000);
  EXPECT_EQ(count_of(config, gpt2_large).trained, 144'000);
  config.options["bases"] = 512;
  EXPECT_EQ(count_of(config, gpt2_medium).stored, 49'152);
  EXPECT_EQ(count_of(nola_of(16, 128), decoder_slots(32, 4096, 4096, 11008)).trained, 57'344);
  EXPECT_EQ(count_of(nola_of(16, 256), decoder_slots(40, 5120, 5120, 13824)).trained, 143'360);
  EXPECT_EQ(count_of(nola_of(16, 512), decoder_slots(80, 8192, 1024, 28672)).trained, 573'440);
}

TEST(Nola, KeepsWhatEveryTypeOwes) {
  const models::Decoder base = golden_base();
  const AdapterConfig config = nola_of(3, 20);
  expect_zero_at_init(config);
  expect_gradients(config, base, {"nola_a"});
  expect_merge_is_forward(config, base);
  expect_round_trip(config, base);
  expect_depends_on_seed(config, true);
}

TEST(Nola, CombinationAndItsGradientAreThoseOfTheMaterialisedBases) {
  const int64_t count = 13, rows = 3, columns = 7;
  const at::Tensor bases = materialised(count, rows * columns, 5), weights = models::random_tensor({rows, columns}, 2);
  const at::Tensor c = models::random_tensor({count}, 1).requires_grad_();
  const at::Tensor plain = c.detach().clone().requires_grad_();
  const at::Tensor expected = at::matmul(plain, bases).view({rows, columns});
  (expected.square() * weights).sum().backward();
  for (const int64_t at_once : {1, 42, 100, 1'000'000}) {  // 1, 2, 4 and all 13 bases
    const at::Tensor sum = random_combination(c, 5, rows, columns, at_once);
    EXPECT_LE(models::relative_error(sum, expected), 1e-14) << at_once;  // float64, sums of 13 in another order
    c.mutable_grad() = at::Tensor();
    (sum.square() * weights).sum().backward();
    EXPECT_LE(models::relative_error(c.grad(), plain.grad()), 1e-14) << at_once;
  }
}

TEST(Nola, BasesAreUniformAndAnotherSeedGivesOthers) {
  const at::NoGradGuard no_grad;
  at::Tensor unit = models::random_tensor({100}, 1).zero_();
  unit[57] = 1;
  const at::Tensor basis = random_combination(unit, 3, 40, 50);
  EXPECT_LE(basis.abs().max().item<double>(), 0.1);                     // 1 / sqrt(100)
  EXPECT_NEAR(basis.std().item<double>(), 0.1 / std::sqrt(3.0), 3e-3);  // 2000 samples: standard error 6e-4
  EXPECT_NEAR(basis.mean().item<double>(), 0, 7e-3);                    // 1.3e-3
  EXPECT_FALSE(at::equal(basis, random_combination(unit, 4, 40, 50)));
}

TEST(Nola, IsWrittenAsTheLoraItComputes) {
  const TemporaryDirectory directory;
  models::Decoder model = golden_base();
  AdapterConfig config = nola_of(3, 20);
  config.alpha = 5;
  const Adapter adapter = trained_adapter(config, model);
  adapter.save(directory.path());
  EXPECT_EQ(core::read_json(directory / "adapter_config.json").at("r"), 3);
  const Adapter read = Adapter::load(directory.path(), model, std::nullopt, at::kCPU);
  EXPECT_EQ(read.config().type, "lora");
  adapter.attach(model);
  const at::Tensor expected = model.forward(golden_tensor("tokens"));
  adapter.detach(model);
  read.attach(model);
  EXPECT_TRUE(at::equal(model.forward(golden_tensor("tokens")), expected));
}

TEST(Nola, FrozenFactorIsTheStartOfTheLoraOfThatSeed) {
  const models::Decoder model = golden_base();
  AdapterConfig plain = nola_of(3, 20);
  plain.type = "lora";
  plain.options = core::Json::object();
  const Adapter lora_adapter = Adapter::create(plain, model, 1, at::kCPU);
  const Adapter adapter = Adapter::create(nola_of(3, 20), model, 1, at::kCPU);
  const auto parts = adapter.function(0).factored({})->parts;
  EXPECT_TRUE(at::equal(parts[0].second, lora_adapter.function(0).parameters()[0].second));
  EXPECT_EQ(parts[0].first.abs().max().item<float>(), 0);
}

TEST(Nola, RefusesWhatItCannotDo) {
  expect_refused({{"type", "nola"}, {"options", {{"bases", 0}}}}, "options.bases: must be at least 1");
  expect_refused({{"type", "nola"}, {"init", "pissa"}}, "starts at B = 0");
}

}  // namespace
}  // namespace moraine::algorithms::adapters
