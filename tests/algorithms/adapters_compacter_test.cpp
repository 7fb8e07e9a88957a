#include "algorithms/adapters/compacter.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <string>
#include <vector>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/linalg_matrix_rank.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "tests/algorithms/adapter_cases.h"
#include "tests/models/random_tensors.h"

namespace moraine::algorithms::adapters {
namespace {

AdapterConfig compacter_of(int64_t n) {
  AdapterConfig config;
  config.type = "compacter";
  config.options = {{"n", n}};
  return config;
}

at::Tensor& named(models::NamedTensors& tensors, const std::string& name) {
  return std::ranges::find(tensors, name, &std::pair<std::string, at::Tensor>::first)->second;
}

TEST(Compacter, CountsTheSharedFactorsOnceAndBothSidesOfEverySlot) {
  // A down and an up layer of T5-base per adapter, k = 768 and d = 24: with biases, d + k, the paper's 2,376.
  const std::vector<models::Slot> down_up = {{"down", models::SlotKind::kLinear, 768, 24},
                                             {"up", models::SlotKind::kLinear, 24, 768}};
  for (const int64_t n : {4, 8, 12})
    EXPECT_EQ(count_of(compacter_of(n), down_up).trained, 2'376 - 24 - 768 + n * n * n) << n;
}

TEST(Compacter, KeepsWhatEveryTypeOwes) {
  const models::Decoder base = golden_base();
  for (const int64_t n : {1, 2, 4}) {
    const AdapterConfig config = compacter_of(n);
    expect_gradients(config, base, {});
    expect_merge_is_forward(config, base);  // the fast form against the Kronecker products
    expect_round_trip(config, base);
    expect_depends_on_seed(config, true);
  }
}

TEST(Compacter, ComputesTheExampleOfTheSpecification) {
  const std::vector<models::Slot> slots = {{"slot", models::SlotKind::kLinear, 4, 2}};
  const Adapter adapter = Adapter::create(compacter_of(2), slots, 1, at::kCPU);
  models::NamedTensors tensors = adapter.parameters();
  named(tensors, "shared.phm_rule").set_data(at::tensor({1., 0., 0., 1., 0., -1., 1., 0.}).view({2, 2, 2}));
  named(tensors, "slot.phm_s").set_data(at::tensor({1., 2., 1., 0.}).view({2, 2}));
  named(tensors, "slot.phm_t").set_data(at::tensor({3., 1.}).view({2, 1}));
  const at::NoGradGuard no_grad;
  const at::Tensor h = at::tensor({3., -1., 6., 0., 1., 3., 0., 6.}).view({4, 2});
  EXPECT_TRUE(at::equal(adapter.function(0).delta({})->to(at::kDouble), h.t().to(at::kDouble)));
  models::SlotBase base;
  base.weight = at::zeros({2, 4}, at::kFloat);
  const at::Tensor y = const_cast<SlotAdapter&>(adapter.function(0)).forward(at::ones({1, 4}, at::kFloat), base, {});
  EXPECT_TRUE(at::equal(y, at::tensor({10., 8.}).to(at::kFloat).view({1, 2})));
}

TEST(Compacter, RankIsAtMostThatOfItsTerms) {
  const models::Decoder model = golden_base();
  for (const int64_t n : {1, 2, 4}) {
    for (const auto& [name, change] : trained_adapter(compacter_of(n), model).deltas(model)) {
      const int64_t expected = std::min({n * n, change.size(0), change.size(1)});
      EXPECT_EQ(at::linalg_matrix_rank(change.to(at::kDouble), 1e-5).item<int64_t>(), expected) << name << " " << n;
    }
  }
}

TEST(Compacter, AllSlotsShareOneTensor) {
  models::Decoder model = golden_base();
  const Adapter adapter = trained_adapter(compacter_of(2), model);
  models::NamedTensors tensors = adapter.parameters();
  EXPECT_EQ(std::ranges::count_if(tensors, [](const auto& entry) { return entry.first.starts_with("shared."); }), 1);
  const at::NoGradGuard no_grad;
  named(tensors, "shared.phm_rule").zero_();
  for (const auto& [name, change] : adapter.deltas(model)) EXPECT_EQ(change.abs().max().item<float>(), 0) << name;
}

TEST(Compacter, FreshAdapterChangesALittle) {
  models::Decoder model = golden_base();
  const at::NoGradGuard no_grad;
  const at::Tensor tokens = golden_tensor("tokens"), before = model.forward(tokens);
  Adapter::create(compacter_of(4), model, 1, at::kCPU).attach(model);
  const double change = models::relative_error(model.forward(tokens), before);
  EXPECT_GT(change, 0);
  EXPECT_LT(change, 0.05);  // H is about n * 1e-4 * 1.5 * 1.5, in 14 layers
}

AdapterConfig behind_sub_layers(int64_t n, int64_t reduction) {
  AdapterConfig config = compacter_of(n);
  config.options["form"] = "adapter";
  config.options["reduction"] = reduction;
  config.target_modules = {"o_proj", "down_proj"};
  return config;
}

TEST(CompacterAdapter, CountsAreThoseOfThePaper) {
  // T5-base: 48 adapters of k = 768 and d = 24 (Compacter++: the 24 behind FFNs), whatever n; the paper adds 47,616
  // numbers of norms.
  std::vector<models::Slot> slots;
  for (int64_t layer = 0; layer < 24; ++layer) {
    slots.push_back({fmt::format("layers.{}.o_proj", layer), models::SlotKind::kLinear, 768, 768});
    slots.push_back({fmt::format("layers.{}.down_proj", layer), models::SlotKind::kLinear, 3072, 768});
  }
  EXPECT_EQ(count_of(behind_sub_layers(4, 32), slots).trained + 47'616, 161'728);
  EXPECT_EQ(count_of(behind_sub_layers(8, 32), slots).trained + 47'616, 162'176);
  EXPECT_EQ(count_of(behind_sub_layers(12, 32), slots).trained + 47'616, 163'392);
  AdapterConfig plus = behind_sub_layers(4, 32);
  plus.target_modules = {"down_proj"};
  EXPECT_EQ(count_of(plus, slots).trained + 47'616, 104'704);
  EXPECT_EQ(count_of(plus, slots).stored, count_of(plus, slots).trained);
}

TEST(CompacterAdapter, KeepsWhatEveryTypeOwes) {
  const models::Decoder base = golden_base();
  for (const auto& [n, reduction] : {std::pair<int64_t, int64_t>{1, 4}, {2, 4}, {4, 2}}) {
    const AdapterConfig config = behind_sub_layers(n, reduction);
    expect_gradients(config, base, {});
    expect_round_trip(config, base);
    const Adapter adapter = trained_adapter(config, base);
    EXPECT_FALSE(adapter.function(0).delta({}).has_value());
    EXPECT_THROW((void)adapter.deltas(base), core::UserError);
  }
}

TEST(CompacterAdapter, ComputesKroneckerProductsAroundATanhGelu) {
  const int64_t n = 2, k = 8, d = 4;
  const std::vector<models::Slot> slots = {{"o_proj", models::SlotKind::kLinear, 3, k}};
  AdapterConfig config = behind_sub_layers(n, 2);
  config.target_modules = {"o_proj"};
  const Adapter adapter = Adapter::create(config, slots, 1, at::kCPU);
  models::NamedTensors tensors = adapter.parameters();
  std::map<std::string, at::Tensor> values;
  uint64_t seed = 1;
  for (auto& [name, tensor] : tensors) {
    values[name] = models::random_tensor(tensor.sizes().vec(), ++seed).to(at::kFloat);
    tensor.set_data(values[name]);
  }
  const auto at2 = [&](const std::string& name, int64_t i, int64_t j) { return values.at(name)[i][j].item<double>(); };
  // H[a u + x, b v + y] = sum_i A_i[a, b] s_i[x] t_i[y], entry by entry.
  const auto layer = [&](const std::vector<double>& in, const std::string& which, int64_t from, int64_t to) {
    std::vector<double> out;
    for (int64_t column = 0; column < to; ++column) {
      double sum = values.at("o_proj." + which + "_bias")[column].item<double>();
      for (int64_t row = 0; row < from; ++row)
        for (int64_t i = 0; i < n; ++i)
          sum += in[static_cast<size_t>(row)] *
                 values.at("shared.phm_rule")[i][row / (from / n)][column / (to / n)].item<double>() *
                 at2("o_proj." + which + "_s", i, row % (from / n)) *
                 at2("o_proj." + which + "_t", i, column % (to / n));
      out.push_back(sum);
    }
    return out;
  };
  const at::NoGradGuard no_grad;
  models::SlotBase base;
  base.weight = models::random_tensor({k, 3}, 30).to(at::kFloat);
  const at::Tensor x = models::random_tensor({2, 3}, 31).to(at::kFloat), y = base.forward(x);
  const at::Tensor found = const_cast<SlotAdapter&>(adapter.function(0)).forward(x, base, {});
  for (int64_t token = 0; token < 2; ++token) {
    std::vector<double> own;
    for (int64_t i = 0; i < k; ++i) own.push_back(y[token][i].item<double>());
    std::vector<double> inner = layer(own, "phm_down", k, d);
    for (double& z : inner) z = 0.5 * z * (1 + std::tanh(std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z)));
    const std::vector<double> change = layer(inner, "phm_up", d, k);
    for (int64_t i = 0; i < k; ++i)
      EXPECT_NEAR(found[token][i].item<double>(), own[static_cast<size_t>(i)] + change[static_cast<size_t>(i)],
                  1e-4 * (1 + std::abs(change[static_cast<size_t>(i)])));  // float32 against double
  }
}

TEST(CompacterAdapter, RefusesWhatItCannotDo) {
  const auto options = [](core::Json values) {
    return core::Json{{"type", "compacter"}, {"options", std::move(values)}};
  };
  expect_refused(options({{"form", "adapter"}}), "name them in target_modules");
  expect_refused(options({{"form", "block"}}), "none of linear, adapter");
  expect_refused(options({{"reduction", 8}}), "is of form: adapter");
  expect_refused(options({{"form", "adapter"}, {"reduction", 0}}), "at least 1");
  EXPECT_THAT(models::thrown<core::UserError>(
                  [] { (void)Adapter::create(behind_sub_layers(4, 8), golden_base(), 1, at::kCPU); }),
              ::testing::HasSubstr("do not divide the 16 outputs"));
}

TEST(Compacter, RefusesWhatItCannotDo) {
  expect_refused({{"type", "compacter"}, {"options", {{"n", 0}}}}, "options.n: must be at least 1");
  expect_refused({{"type", "compacter"}, {"rank", 4}}, "has no rank");
  const models::Decoder model = golden_base();
  const std::string message =
      models::thrown<core::UserError>([&] { (void)Adapter::create(compacter_of(3), model, 1, at::kCPU); });
  EXPECT_THAT(message, ::testing::HasSubstr("options.n = 3 does not divide the sides of"));
}

}  // namespace
}  // namespace moraine::algorithms::adapters
