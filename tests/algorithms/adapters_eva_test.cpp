// init: eva, and the sums over inputs that it starts from.
#include <map>
#include <memory>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_svd.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "algorithms/adapters/lora.h"
#include "core/error.h"
#include "tests/algorithms/adapter_cases.h"
#include "tests/models/random_tensors.h"
#include "tests/temporary_directory.h"

namespace moraine::algorithms::adapters {
namespace {

using testing::HasSubstr;

AdapterConfig eva_config(int64_t rank = 3, const std::string& type = "lora") {
  AdapterConfig config;
  config.type = type;
  config.rank = rank;
  config.alpha = 6;
  config.init = "eva";
  return config;
}

/// Remembers what its slot was given.
class Recorded final : public models::SlotFunction {
 public:
  at::Tensor forward(const at::Tensor& x, const models::SlotBase& base, const models::Pass&) override {
    inputs.push_back(x.detach().reshape({-1, x.size(-1)}).to(at::kDouble));
    return base.forward(x);
  }
  models::NamedTensors parameters() const override { return {}; }
  std::vector<at::Tensor> inputs;
};

/// Inputs of all linear slots over the first golden tokens, by path, from a pass of its own.
std::map<std::string, at::Tensor> inputs_of(const models::Decoder& base, int64_t rows) {
  models::Decoder model = base.share();
  std::map<std::string, std::shared_ptr<Recorded>> recorders;
  for (const Target& target : targets_of(eva_config(), model.slots()))
    model.attach(target.slot.path, recorders[target.slot.path] = std::make_shared<Recorded>());
  (void)model.loss(golden_tensor("tokens").narrow(0, 0, rows));
  std::map<std::string, at::Tensor> all;
  for (const auto& [path, recorder] : recorders) all[path] = at::cat(recorder->inputs);
  return all;
}

/// Each row of the golden tokens is an example; batches of two.
Calibration golden_calibration(models::Decoder& model) {
  TrainConfig train;
  train.batch_size = 2;
  return calibration_of(
      model,
      [&model](int64_t step, int64_t first, int64_t count) {
        const auto loss = model.loss(golden_tensor("tokens").narrow(0, 2 * step + first, count));
        return TrainJob::MicroLoss{loss.sum, loss.count};
      },
      train);
}

TEST(Calibration, MomentsAreThoseOfTheInputsWhateverTheBatchesAre) {
  models::Decoder model = golden_base();
  const int64_t rows = golden_tensor("tokens").size(0);
  const auto targets = targets_of(eva_config(), model.slots());
  const auto inputs = inputs_of(model, rows);
  size_t seen = 0;
  golden_calibration(model).input_moments(targets, rows, [&](size_t i, const at::Tensor& moments) {
    EXPECT_EQ(i, seen++);
    EXPECT_EQ(moments.scalar_type(), at::kDouble);
    const at::Tensor& x = inputs.at(targets[i].slot.path);
    // Attention over one row and over several rounds differently in float32.
    EXPECT_LT(models::relative_error(moments, at::matmul(x.t(), x)), 1e-6) << targets[i].slot.path;
    EXPECT_FALSE(moments.requires_grad());
  });
  EXPECT_EQ(seen, targets.size());
  for (const Target& target : targets) EXPECT_EQ(model.attached(target.slot.path), nullptr);
}

TEST(Eva, StartsFromTheLeadingSingularVectorsOfTheInputs) {
  const at::NoGradGuard no_grad;
  const int64_t rows = golden_tensor("tokens").size(0);
  for (const char* type : {"lora", "dora"}) {
    models::Decoder model = golden_base();
    AdapterConfig config = eva_config(3, type);
    config.options = {{"examples", rows}};
    config.rank_pattern = {{"q_proj", 2}};
    const Adapter adapter = Adapter::create(config, model, 1, at::kCPU, golden_calibration(model));
    const auto inputs = inputs_of(model, rows);
    const models::NamedTensors parameters = adapter.parameters();
    const std::map<std::string, at::Tensor> by_name(parameters.begin(), parameters.end());
    for (const Target& target : adapter.targets()) {
      const std::string& path = target.slot.path;
      const at::Tensor a = by_name.at(path + ".lora_A.weight").to(at::kDouble);
      const auto [u, s, vh] = at::linalg_svd(inputs.at(path), /*full_matrices=*/false);
      // Each row is a singular vector up to its sign. Inputs are float32: vectors turn by 1e-7 over the relative gap to
      // the next singular value, which is above 1e-3 in this model.
      const at::Tensor cosines = at::matmul(a, vh.narrow(0, 0, target.rank).t()).abs();
      EXPECT_LT((cosines - at::eye(target.rank)).abs().max().item<double>(), 1e-4) << path;
      EXPECT_EQ(by_name.at(path + ".lora_B.weight").abs().max().item<float>(), 0) << path;
    }
  }
}

TEST(Eva, KeepsThePromisesOfATypeOfAdapter) {
  for (const char* type : {"lora", "dora"}) {
    const AdapterConfig config = eva_config(3, type);
    expect_zero_at_init(config);
    expect_linear_promises(config, {"lora_A.weight"}, /*differs=*/false);  // B = 0
  }
}

TEST(Eva, ItsFileForPeftIsAPlainLora) {
  const models::Decoder base = golden_base();
  const Adapter adapter = trained_adapter(eva_config(), base);
  const TemporaryDirectory directory;
  adapter.save(directory.path());
  const Adapter lora = Adapter::load(directory.path(), base, std::nullopt, at::kCPU);
  EXPECT_EQ(lora.config().init, "kaiming");
  const auto expected = adapter.deltas(base), found = lora.deltas(base);
  ASSERT_EQ(found.size(), expected.size());
  for (size_t i = 0; i < found.size(); ++i) EXPECT_TRUE(at::equal(found[i].second, expected[i].second));
}

TEST(Eva, IsRefusedWithoutExamplesWithTooFewAndForOtherTypes) {
  const models::Decoder base = golden_base();
  EXPECT_THAT(models::thrown<core::UserError>([&] { (void)Adapter::create(eva_config(), base, 1, at::kCPU); }),
              HasSubstr("starts from examples"));
  Calibration poor = made_up_calibration();
  poor.input_moments = [](std::span<const Target> targets, int64_t, const Calibration::Each& each) {
    for (size_t i = 0; i < targets.size(); ++i) {
      const at::Tensor x = models::random_tensor({2, targets[i].slot.in}, i).to(at::kDouble);
      each(i, at::matmul(x.t(), x));
    }
  };
  (void)Adapter::create(eva_config(2), base, 1, at::kCPU, poor);
  EXPECT_THAT(models::thrown<core::UserError>([&] { (void)Adapter::create(eva_config(3), base, 1, at::kCPU, poor); }),
              HasSubstr("fewer than 3 directions"));
  expect_refused({{"options", {{"examples", 8}}}}, "is for init: eva");
  expect_refused({{"init", "eva"}, {"options", {{"examples", 0}}}}, "at least 1");
  expect_refused({{"init", "eva"}, {"options", {{"rho", 2.0}}}}, "no such option");
  for (const char* type : {"nola", "dylora", "matryoshka"})
    expect_refused({{"type", type}, {"init", "eva"}}, "kaiming or gaussian");
  expect_refused({{"type", "lora_xs"}, {"init", "eva"}}, "leave init out");
  checked_config({{"init", "eva"}, {"options", {{"examples", 8}}}});
}

}  // namespace
}  // namespace moraine::algorithms::adapters
