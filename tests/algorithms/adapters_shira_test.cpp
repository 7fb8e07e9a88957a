#include "algorithms/adapters/shira.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <vector>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/linalg_matrix_rank.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "core/file.h"
#include "models/tensor_io.h"
#include "tests/algorithms/adapter_cases.h"
#include "tests/models/random_tensors.h"
#include "tests/temporary_directory.h"

namespace moraine::algorithms::adapters {
namespace {

const std::filesystem::path kGolden = std::filesystem::path(MORAINE_SOURCE_DIR) / "tests/algorithms/golden";

AdapterConfig shira_of(const std::string& mask, int64_t rank = 2, double density = 0) {
  AdapterConfig config;
  config.type = "shira";
  config.rank = rank;
  config.options = {{"mask", mask}, {"density", density}};
  return config;
}

std::vector<models::Slot> one_slot(int64_t in, int64_t out) { return {{"slot", models::SlotKind::kLinear, in, out}}; }

/// S of one slot whose values are drawn, by its flat positions.
std::map<int64_t, float> entries(const at::Tensor& change) {
  std::map<int64_t, float> found;
  const at::Tensor flat = change.flatten(), positions = at::nonzero(flat).flatten();
  for (int64_t i = 0; i < positions.size(0); ++i) {
    const int64_t position = positions[i].item<int64_t>();
    found[position] = flat[position].item<float>();
  }
  return found;
}

TEST(Shira, CountsAreThoseOfPeftAndOfThePaper) {
  AdapterConfig config = shira_of("rand", 32);
  config.target_modules = {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"};
  const auto llama = decoder_slots(32, 4096, 4096, 11008);
  EXPECT_EQ(count_of(config, llama).trained, 56'098'816);
  EXPECT_EQ(count_of(config, llama).stored, 56'098'816);
  config.options["mask"] = "wm";
  EXPECT_EQ(count_of(config, llama).stored, 3 * 56'098'816);  // and a row and a column each
  const AdapterConfig one_percent = shira_of("wm", 8, 0.01);
  EXPECT_EQ(count_of(one_percent, one_slot(4096, 11008)).trained, 450'888);  // 450,887.68
}

TEST(Shira, StructMaskHasEveryFthRowAndTheDiagonal) {
  for (const auto& [out, in, density] :
       {std::tuple<int64_t, int64_t, double>{64, 64, 0.1}, {16, 16, 0.5}, {16, 24, 0.25}, {24, 16, 0.25}}) {
    const AdapterConfig config = shira_of("struct", 8, density);
    const int64_t every = std::llround(1 / density), least = std::min(in, out);
    int64_t expected = 0;
    for (int64_t row = 0; row < out; ++row) expected += row % every == 0 ? in : row < least ? 1 : 0;
    if (in == out) {
      const int64_t rows = (in + every - 1) / every;
      EXPECT_EQ(expected, rows * in + in - rows) << "the spec's closed form";
    }
    EXPECT_EQ(count_of(config, one_slot(in, out)).trained, expected) << out << " x " << in;
  }
}

TEST(Shira, StructIsOfFullRankAndItsMaskFollowsFromTheShape) {
  const models::Decoder model = golden_base();
  const Adapter adapter = trained_adapter(shira_of("struct", 8, 0.25), model);
  const at::NoGradGuard no_grad;
  for (const auto& [name, change] : adapter.deltas(model)) {
    for (const auto& [position, value] : entries(change)) {
      const int64_t row = position / change.size(1), column = position % change.size(1);
      EXPECT_TRUE(row % 4 == 0 || row == column) << name << " " << position;
    }
    EXPECT_EQ(at::linalg_matrix_rank(change.to(at::kDouble)).item<int64_t>(), std::min(change.size(0), change.size(1)))
        << name;
  }
  EXPECT_TRUE(adapter.state().empty());
}

TEST(Shira, KeepsWhatEveryTypeOwes) {
  const models::Decoder base = golden_base();
  for (const std::string mask : {"rand", "wm", "struct"}) {
    SCOPED_TRACE(mask);
    const AdapterConfig config = shira_of(mask);
    expect_zero_at_init(config);
    expect_gradients(config, base, {});
    expect_merge_is_forward(config, base);
    expect_round_trip(config, base);
    expect_depends_on_seed(config, mask == "rand");
  }
}

TEST(Shira, ChangesExactlyKEntriesAndNoOther) {
  const models::Decoder model = golden_base();
  for (const std::string mask : {"rand", "wm"}) {
    const Adapter adapter = trained_adapter(shira_of(mask), model);
    const at::NoGradGuard no_grad;
    const models::Decoder merged = model.plus(adapter.deltas(model));
    for (const Target& target : adapter.targets()) {
      const std::string name = target.slot.path + ".weight";
      const at::Tensor before = model.weights().at(name), after = merged.weights().at(name);
      EXPECT_EQ((before != after).sum().item<int64_t>(), 2 * (target.slot.in + target.slot.out)) << name;
    }
  }
}

TEST(Shira, GradientOfAValueIsThatOfItsEntry) {
  const Adapter adapter = Adapter::create(shira_of("rand"), golden_base(), 1, at::kCPU);
  auto& function = const_cast<SlotAdapter&>(adapter.function(0));
  const models::Slot& slot = adapter.targets()[0].slot;
  models::SlotBase base;
  base.weight = at::zeros({slot.out, slot.in}, at::kDouble);
  const at::Tensor x = models::random_tensor({3, slot.in}, 1), weights = models::random_tensor({3, slot.out}, 2);
  at::Tensor values = function.parameters()[0].second;
  (function.forward(x, base, {.training = true}) * weights).sum().backward();
  const at::Tensor indices = function.peft_tensors()[0].second;
  for (int64_t e = 0; e < values.size(0); ++e) {
    double expected = 0;
    for (int64_t t = 0; t < 3; ++t)
      expected +=
          weights[t][indices[0][e].item<int64_t>()].item<double>() * x[t][indices[1][e].item<int64_t>()].item<double>();
    // The gradient of float32 values is rounded to float32.
    EXPECT_NEAR(values.grad()[e].item<double>(), expected, 1e-6 * (1 + std::abs(expected))) << e;
  }
}

TEST(Shira, OneProductForBaseAndChangeEqualsTheirSum) {
  const Adapter adapter = trained_adapter(shira_of("rand"), golden_base());
  auto& function = const_cast<SlotAdapter&>(adapter.function(0));
  const models::Slot& slot = adapter.targets()[0].slot;
  models::SlotBase one, sum;
  one.weight = models::random_tensor({slot.out, slot.in}, 1).to(at::kFloat);
  one.bias = sum.bias = models::random_tensor({slot.out}, 2).to(at::kFloat);
  sum.weight = one.weight.to(at::kDouble);  // of another type than x
  const at::Tensor x = models::random_tensor({3, slot.in}, 3).to(at::kFloat);
  const at::NoGradGuard no_grad;
  expect_close(function.forward(x, one, {}), function.forward(x, sum, {}), "sum");
}

TEST(Shira, LargestWeightsAreChosenAndTheFirstOfEqualOnes) {
  const models::Decoder model = golden_base();
  const Adapter adapter = trained_adapter(shira_of("wm"), model);
  const at::NoGradGuard no_grad;
  for (const auto& [name, change] : adapter.deltas(model)) {
    const at::Tensor sizes = model.weights().at(name).abs().flatten();
    const auto chosen = entries(change);
    const auto count = static_cast<int64_t>(chosen.size());
    const float least = std::get<0>(at::topk(sizes, count))[count - 1].item<float>();
    for (const auto& [position, value] : chosen) EXPECT_GE(sizes[position].item<float>(), least) << name;
  }
  models::SlotBase equal;
  equal.weight = at::zeros({4, 5}, at::kFloat);
  equal.weight[2][3] = -1;
  const AdapterConfig config = shira_of("wm", 8, 0.2);
  const Target target{.slot = one_slot(5, 4)[0], .rank = 8, .alpha = 8};
  const auto tied = shira().make({.target = target, .config = config, .base = &equal});
  const at::Tensor indices = tied->state()[0].second;
  EXPECT_EQ(std::vector<int>(indices.data_ptr<int>(), indices.data_ptr<int>() + 8),
            (std::vector<int>{0, 0, 0, 2, 0, 1, 2, 3}));
}

TEST(Shira, GradientsAndTheirProductsWithWeightsChooseAndTheFirstOfEqualOnes) {
  // By a float64 loop over all entries: a stable order by descending importance.
  const models::Decoder model = golden_base();
  for (const char* mask : {"grad", "snip"}) {
    const Adapter adapter = Adapter::create(shira_of(mask), model, 1, at::kCPU, made_up_calibration());
    std::vector<at::Tensor> gradients;
    made_up_calibration().gradients(adapter.targets(), 1, [&](size_t, const at::Tensor& g) { gradients.push_back(g); });
    for (size_t t = 0; t < adapter.targets().size(); ++t) {
      const at::Tensor g = gradients[t].to(at::kDouble).flatten().contiguous(),
                       w = model.base(adapter.targets()[t].slot.path).weight.to(at::kDouble).flatten().contiguous();
      std::vector<std::pair<double, int64_t>> order;
      for (int64_t i = 0; i < g.size(0); ++i) {
        const double own = g.data_ptr<double>()[i];
        order.emplace_back(-std::abs(mask == std::string("grad") ? own : own * w.data_ptr<double>()[i]), i);
      }
      std::ranges::sort(order);
      const at::Tensor indices = adapter.function(t).state()[0].second;
      const int64_t count = indices.size(1), in = adapter.targets()[t].slot.in;
      std::set<int64_t> expected, found;
      for (int64_t i = 0; i < count; ++i) {
        expected.insert(order[static_cast<size_t>(i)].second);
        found.insert(indices[0][i].item<int64_t>() * in + indices[1][i].item<int64_t>());
      }
      EXPECT_EQ(found, expected) << mask << " " << adapter.targets()[t].slot.path;
    }
  }
  models::SlotBase base;
  base.weight = at::zeros({4, 5}, at::kFloat);
  base.weight[2][3] = -1;
  const AdapterConfig config = shira_of("snip", 8, 0.1);
  const Target target{.slot = one_slot(5, 4)[0], .rank = 8, .alpha = 8};
  const at::Tensor gradient = at::zeros({4, 5}, at::kFloat).fill_(1e-30);
  const auto tied = shira().make({.target = target, .config = config, .base = &base, .gradient = gradient});
  const at::Tensor indices = tied->state()[0].second;
  EXPECT_EQ(std::vector<int>(indices.data_ptr<int>(), indices.data_ptr<int>() + 4), (std::vector<int>{0, 2, 0, 3}));
}

TEST(Shira, MasksByGradientsKeepThePromisesOfATypeOfAdapter) {
  for (const char* mask : {"grad", "snip"}) {
    const AdapterConfig config = shira_of(mask);
    expect_zero_at_init(config);
    expect_merge_is_forward(config, golden_base(at::kDouble));
    expect_round_trip(config, golden_base());
    expect_depends_on_seed(config, /*differs=*/false);
    EXPECT_TRUE(shira().in_peft(config));
  }
}

TEST(ShiraAgainstPeft, LogitsLossAndGradientsAreEqual) {
  const auto file = core::Safetensors::open(kGolden / "shira" / "adapter_model.safetensors");
  const auto expected = core::Safetensors::open(kGolden / "shira_golden.safetensors");
  models::Decoder model = golden_base();
  AdapterConfig config = shira_of("wm");  // its indices are tensors, so PEFT's can be put there
  config.target_modules = {"q_proj", "down_proj"};
  const Adapter adapter = Adapter::create(config, model, 1, at::kCPU);
  models::NamedTensors all = adapter.parameters();
  for (auto& entry : adapter.state()) all.push_back(entry);
  ASSERT_EQ(all.size(), file.tensors().size());
  for (auto& [name, tensor] : all) tensor.set_data(models::copy_of(*file.find("base_model.model." + name)));
  adapter.attach(model);
  const at::Tensor tokens = golden_tensor("tokens");
  expect_close(model.forward(tokens.narrow(1, 0, tokens.size(1) - 1)).detach(),
               models::copy_of(*expected.find("logits")), "logits");
  const at::Tensor loss = model.loss(tokens).sum;
  expect_close(loss.detach(), models::copy_of(*expected.find("loss")), "loss");
  loss.backward();
  for (const auto& [name, tensor] : adapter.parameters())
    expect_close(tensor.grad(), models::copy_of(*expected.find("grad/" + name)), name);
}

TEST(ShiraAgainstPeft, WritesTheFieldsAndTensorsThatPeftWrites) {
  const TemporaryDirectory directory;
  const models::Decoder model = golden_base();
  AdapterConfig config = shira_of("rand");
  config.target_modules = {"down_proj", "q_proj"};
  trained_adapter(config, model).save(directory.path());
  core::Json of_peft = core::read_json(kGolden / "shira" / "adapter_config.json");
  of_peft["auto_mapping"] = nullptr;  // of the class it was made in
  of_peft["random_seed"] = nullptr;   // ours draws other entries
  EXPECT_EQ(core::read_json(directory / "adapter_config.json"), of_peft);
  const auto ours = core::Safetensors::open(directory / "adapter_model.safetensors");
  const auto theirs = core::Safetensors::open(kGolden / "shira" / "adapter_model.safetensors");
  ASSERT_EQ(ours.tensors().size(), theirs.tensors().size());
  for (size_t i = 0; i < ours.tensors().size(); ++i) {
    EXPECT_EQ(ours.tensors()[i].name, theirs.tensors()[i].name);
    EXPECT_EQ(ours.tensors()[i].shape, theirs.tensors()[i].shape);
    EXPECT_EQ(ours.tensors()[i].dtype, theirs.tensors()[i].dtype);
  }
}

TEST(ShiraAgainstPeft, WhatPeftCannotReadIsNotWritten) {
  const TemporaryDirectory directory;
  const models::Decoder model = golden_base();
  AdapterConfig pattern = shira_of("rand"), layers = shira_of("rand");
  pattern.rank_pattern = {{"q_proj", 1}};
  layers.target_modules = {"q_proj"};
  layers.layers_to_transform = {1};
  for (const AdapterConfig& config : {pattern, layers, shira_of("struct"), shira_of("rand", 8, 0.1)}) {
    EXPECT_FALSE(shira().in_peft(config));
    EXPECT_THROW(trained_adapter(config, model).save(directory.path()), core::UserError);
  }
  EXPECT_TRUE(shira().in_peft(shira_of("wm")));
}

TEST(Shira, RefusesWhatItCannotDo) {
  const auto options = [](core::Json values) { return core::Json{{"type", "shira"}, {"options", std::move(values)}}; };
  expect_refused(options({{"mask", "fisher"}}), "none of rand, wm, grad, snip, struct");
  expect_refused(options({{"mask", "wm"}, {"examples", 8}}), "masks grad and snip, this one is wm");
  expect_refused(options({{"mask", "grad"}, {"examples", 0}}), "at least 1");
  expect_refused(options({{"density", 1.5}}), "options.density: 1.5 is not in 0 .. 1");
  expect_refused({{"type", "shira"}, {"rank", 4}, {"options", {{"density", 0.1}}}}, "leave rank and rank_pattern out");
  for (const core::Json& field :
       {core::Json{{"alpha", 16}}, core::Json{{"init", "pissa"}}, core::Json{{"use_rslora", true}}}) {
    core::Json config = {{"type", "shira"}};
    config.update(field);
    expect_refused(config, "no scale and starts at 0");
  }
  // 8 x 16 has 128 entries, and a rank asks for 24.
  const std::string message =
      models::thrown<core::UserError>([] { (void)count_of(shira_of("rand", 6), one_slot(16, 8)); });
  EXPECT_THAT(message, ::testing::HasSubstr("choose a rank up to 5"));
}

}  // namespace
}  // namespace moraine::algorithms::adapters
