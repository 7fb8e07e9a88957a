#include "algorithms/adapters/adaptertune.h"

#include <cmath>
#include <set>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/erf.h>
#include <ATen/ops/matmul.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "models/vit.h"
#include "tests/algorithms/adapter_cases.h"
#include "tests/models/random_tensors.h"

namespace moraine::algorithms::adapters {
namespace {

AdapterConfig adaptertune_of(int64_t rank, core::Json options = core::Json::object()) {
  AdapterConfig config;
  config.type = "adaptertune";
  config.rank = rank;
  config.options = std::move(options);
  return config;
}

std::vector<models::Slot> blocks(int64_t count, int64_t d) {
  std::vector<models::Slot> slots;
  for (int64_t block = 0; block < count; ++block)
    slots.push_back({fmt::format("encoder.layer.{}", block), models::SlotKind::kBlock, d, d});
  return slots;
}

models::Vit small_vit() {
  models::VitConfig config;
  config.hidden_size = 16, config.intermediate_size = 24, config.num_layers = 3, config.num_heads = 4;
  config.image_size = 8, config.patch_size = 4, config.num_channels = 1;
  return models::Vit::from_config(config, 3, at::kDouble);
}

TEST(AdapterTune, HasTheNumbersOfThePaper) {
  EXPECT_EQ(count_of(adaptertune_of(16), blocks(12, 192)).trained, 76'224);
  EXPECT_EQ(count_of(adaptertune_of(16), blocks(12, 384)).trained, 152'256);
  EXPECT_EQ(count_of(adaptertune_of(16), blocks(12, 768)).trained, 304'320);
  // Blocks 0, 5 and 10 of 12.
  EXPECT_EQ(count_of(adaptertune_of(16, {{"every", 5}}), blocks(12, 768)).trained, 304'320 / 4);
}

TEST(AdapterTune, IsABottleneckBehindTheWholeBlock) {
  const at::NoGradGuard no_grad;
  const Adapter adapter =
      Adapter::create(adaptertune_of(4, {{"scale", 0.5}, {"init", "small"}}), blocks(1, 16), 1, at::kCPU);
  models::NamedTensors parts = adapter.parameters();
  uint64_t seed = 5;
  for (auto& [name, tensor] : parts) tensor.add_(models::random_tensor(tensor.sizes().vec(), ++seed).to(at::kFloat));
  const auto part = [&](size_t i) { return parts[i].second.to(at::kDouble); };  // down bias, weight; up bias, weight
  const at::Tensor h = models::random_tensor({2, 3, 16}, 9);
  const at::Tensor z = at::matmul(h, part(1).t()) + part(0);
  const at::Tensor gelu = z * 0.5 * (1 + at::erf(z / std::sqrt(2.0)));
  const at::Tensor wanted = h + (at::matmul(gelu, part(3).t()) + part(2)) * 0.5;
  const at::Tensor found = const_cast<SlotAdapter&>(adapter.function(0)).forward(h, {}, {});
  EXPECT_LT(models::relative_error(found, wanted), 1e-12);
}

TEST(AdapterTune, ItsFirstStepMovesTheUpperHalfAlone) {
  models::Vit vit = small_vit();
  const Adapter adapter = Adapter::create(adaptertune_of(4), vit, 1, at::kCPU);
  adapter.attach(vit);
  vit.features(models::random_tensor({2, 1, 8, 8}, 4)).pow(2).sum().backward();
  for (const auto& [name, tensor] : adapter.parameters()) {
    const double largest = tensor.grad().abs().max().item<double>();
    EXPECT_EQ(name.find(".down.") != std::string::npos, largest == 0) << name << " " << largest;
  }
}

TEST(AdapterTune, LeavesBlocksBetweenAloneAndComesBehindMatricesThatAreTaken) {
  const at::NoGradGuard no_grad;
  models::Vit vit = small_vit();
  const Adapter adapter = Adapter::create(adaptertune_of(4, {{"every", 2}}), vit, 1, at::kCPU);
  std::set<std::string> touched;
  for (const auto& [name, tensor] : adapter.parameters()) touched.insert(name.substr(0, name.find('.', 14)));
  EXPECT_EQ(touched, (std::set<std::string>{"encoder.layer.0", "encoder.layer.2"}));
  AdapterConfig lora;
  lora.rank = 2;
  const Adapter inside = Adapter::create(lora, vit, 1, at::kCPU);
  inside.attach(vit);
  adapter.attach(vit);  // a block may hold taken slots
  adapter.detach(vit);
}

TEST(AdapterTune, RefusesWhatItCannotDo) {
  expect_refused({{"type", "adaptertune"}, {"options", {{"every", 0}}}}, "options.every");
  expect_refused({{"type", "adaptertune"}, {"options", {{"init", "ones"}}}}, "zero or small");
  expect_refused({{"type", "adaptertune"}, {"alpha", 16}}, "not scaled by its rank");
  expect_refused({{"type", "adaptertune"}, {"dropout", 0.1}}, "no dropout inside");
  models::Vit vit = small_vit();
  EXPECT_THROW((void)Adapter::create(adaptertune_of(4), vit, 1, at::kCPU).deltas(vit), core::UserError);
  AdapterConfig named = adaptertune_of(4);
  named.target_modules = {"query"};
  EXPECT_THROW((void)Adapter::create(named, vit, 1, at::kCPU), core::UserError);
}

}  // namespace
}  // namespace moraine::algorithms::adapters
