#include "algorithms/adapters/lora_sb.h"

#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_eigvalsh.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/sign.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "tests/algorithms/adapter_cases.h"
#include "tests/models/random_tensors.h"
#include "tests/temporary_directory.h"

namespace moraine::algorithms::adapters {
namespace {

using testing::HasSubstr;

AdapterConfig sb_config(int64_t rank = 3, std::vector<std::string> modules = {"all-linear"}) {
  AdapterConfig config;
  config.type = "lora_sb";
  config.rank = rank;
  config.target_modules = std::move(modules);
  return config;
}

using Loss = std::function<TrainJob::MicroLoss(int64_t, int64_t, int64_t)>;

/// Losses on the golden tokens, of which each row is an example.
Loss golden_loss(models::Decoder& model) {
  return [&model](int64_t step, int64_t first, int64_t count) {
    const auto loss = model.loss(golden_tensor("tokens").narrow(0, 2 * step + first, count));
    return TrainJob::MicroLoss{loss.sum, loss.count};
  };
}

/// Of the mean loss by weights, from a model whose weights are all trained; by name.
std::map<std::string, at::Tensor> full_gradients(const models::Decoder& base, int64_t rows) {
  models::Decoder model = base.share();
  const models::NamedTensors weights = model.make_trainable();
  const auto loss = model.loss(golden_tensor("tokens").narrow(0, 0, rows));
  (loss.sum / static_cast<double>(loss.count)).backward();
  std::map<std::string, at::Tensor> gradients;
  for (const auto& [name, weight] : weights) gradients[name] = weight.grad();
  return gradients;
}

std::vector<at::Tensor> gradients_of(const Calibration& calibration, const models::Decoder& model, int64_t examples) {
  const std::vector<Target> targets = targets_of(sb_config(), model.slots());
  std::vector<at::Tensor> all;
  calibration.gradients(targets, examples, [&](size_t i, const at::Tensor& gradient) {
    EXPECT_EQ(i, all.size());
    all.push_back(gradient);
  });
  EXPECT_EQ(all.size(), targets.size());
  return all;
}

TrainConfig batches_of_two(int64_t micro = 0) {
  TrainConfig train;
  train.batch_size = 2;
  train.micro_batch_size = micro;
  train.learning_rate = 0.01;
  return train;
}

TEST(Calibration, GradientsAreThoseOfFullFineTuningWhateverTheMicroBatchesAre) {
  models::Decoder model = golden_base();
  const at::Tensor before = model.forward(golden_tensor("tokens")).detach();
  const int64_t rows = golden_tensor("tokens").size(0);
  const auto expected = full_gradients(model, rows);
  for (const int64_t micro : {0, 1}) {
    const auto found = gradients_of(calibration_of(model, golden_loss(model), batches_of_two(micro)), model, rows);
    const auto targets = targets_of(sb_config(), model.slots());
    for (size_t i = 0; i < targets.size(); ++i)
      expect_close(found[i], expected.at(targets[i].slot.path + ".weight"), targets[i].slot.path);
  }
  EXPECT_TRUE(models::same_bits(model.forward(golden_tensor("tokens")).detach(), before)) << "the model is as it was";
  for (const auto& [name, weight] : model.weights()) EXPECT_FALSE(weight.grad().defined()) << name;
}

TEST(Calibration, SeesTheFirstExamplesOfTrainingOnce) {
  models::Decoder model = golden_base();
  std::vector<std::tuple<int64_t, int64_t, int64_t>> calls;
  const Loss loss = [&](int64_t step, int64_t first, int64_t count) {
    calls.emplace_back(step, first, count);
    const auto one = model.loss(golden_tensor("tokens").narrow(0, 0, 1));
    return TrainJob::MicroLoss{one.sum, one.count};
  };
  TrainConfig train = batches_of_two();
  train.batch_size = 4;
  train.micro_batch_size = 3;
  (void)gradients_of(calibration_of(model, loss, train), model, 6);
  EXPECT_EQ(calls, (std::vector<std::tuple<int64_t, int64_t, int64_t>>{{0, 0, 3}, {0, 3, 1}, {1, 0, 2}}));
}

TEST(Calibration, KnowsTheLearningRateOfTheFirstStep) {
  models::Decoder model = golden_base();
  TrainConfig train = batches_of_two();
  EXPECT_DOUBLE_EQ(calibration_of(model, nullptr, train).first_learning_rate, 0.01);
  train.warmup_steps = 5;
  EXPECT_DOUBLE_EQ(calibration_of(model, nullptr, train).first_learning_rate, 0.002);
}

TEST(Calibration, GradientsThatAreNotFiniteAndExamplesWithoutTargetsAreErrors) {
  models::Decoder model = golden_base();
  const auto with = [&](double factor, int64_t count) {
    const Loss loss = [&model, factor, count](int64_t, int64_t, int64_t) {
      return TrainJob::MicroLoss{model.loss(golden_tensor("tokens")).sum * factor, count};
    };
    (void)gradients_of(calibration_of(model, loss, batches_of_two()), model, 2);
  };
  EXPECT_THAT(models::thrown<core::NumericError>([&] { with(std::numeric_limits<double>::quiet_NaN(), 2); }),
              HasSubstr("q_proj"));
  EXPECT_THAT(models::thrown<core::UserError>([&] { with(1, 0); }), HasSubstr("no targets"));
}

TEST(LoraSb, CountsEqualThePublishedNumbers) {
  EXPECT_EQ(count_of(sb_config(96), decoder_slots(32, 4096, 1024, 14336)).trained, 2'064'384);  // Mistral-7B
  EXPECT_EQ(count_of(sb_config(96), decoder_slots(42, 3584, 2048, 14336)).trained, 2'709'504);  // Gemma-2-9B
  const auto llama = decoder_slots(28, 3072, 1024, 8192);                                       // Llama-3.2-3B
  EXPECT_EQ(count_of(sb_config(96), llama).trained, 1'806'336);
  EXPECT_EQ(count_of(sb_config(64), llama).trained, 802'816);
  EXPECT_EQ(count_of(sb_config(32), llama).trained, 200'704);
  EXPECT_EQ(count_of(sb_config(32), llama).stored, 200'704 + 48'627'712);  // A and B as those of a LoRA
}

TEST(LoraSb, StartsFromTheBestApproximationOfTheFirstStepAndItsSignAloneMatters) {
  const at::NoGradGuard no_grad;
  const models::Decoder base = golden_base();
  const Adapter adapter = Adapter::create(sb_config(), base, 1, at::kCPU, made_up_calibration());
  std::vector<at::Tensor> gradients;
  made_up_calibration().gradients(adapter.targets(), 1, [&](size_t, const at::Tensor& g) { gradients.push_back(g); });
  const double rate = made_up_calibration().first_learning_rate;
  for (size_t i = 0; i < adapter.targets().size(); ++i) {
    const at::Tensor step = at::sign(gradients[i].to(at::kDouble)) * -rate;
    const at::Tensor squares = at::linalg_eigvalsh(at::matmul(step, step.t()));  // ascending
    const at::Tensor left = step - *adapter.function(i).delta(base.base(adapter.targets()[i].slot.path));
    // Eckart and Young: what is left has the other singular values. Factors are float32.
    EXPECT_NEAR(left.square().sum().item<double>(), squares.narrow(0, 0, squares.size(0) - 3).sum().item<double>(),
                1e-5 * squares.sum().item<double>());
    const auto state = adapter.function(i).state();
    const at::Tensor a = state[0].second, b = state[1].second, r = adapter.function(i).parameters()[0].second;
    EXPECT_LE((at::matmul(a, a.t()) - at::eye(3)).abs().max().item<double>(), 1e-5);
    EXPECT_LE((at::matmul(b.t(), b) - at::eye(3)).abs().max().item<double>(), 1e-5);
    EXPECT_NEAR(r[0][0].item<double>(), std::sqrt(squares[-1].item<double>()), 1e-5 * r[0][0].item<double>());
    EXPECT_EQ(r[0][1].item<float>(), 0);
  }
  Calibration scaled = made_up_calibration();
  scaled.gradients = [](std::span<const Target> targets, int64_t examples, const Calibration::Each& each) {
    made_up_calibration().gradients(targets, examples, [&](size_t i, const at::Tensor& g) { each(i, g * 37); });
  };
  EXPECT_EQ(Adapter::create(sb_config(), base, 1, at::kCPU, scaled).to_artefact({}, 1)->id(),
            adapter.to_artefact({}, 1)->id());
}

TEST(LoraSb, ItsGradientIsTheProjectionOfTheFullOne) {
  models::Decoder model = golden_base();
  const int64_t rows = golden_tensor("tokens").size(0);
  const Adapter adapter = Adapter::create(sb_config(), model, 1, at::kCPU, made_up_calibration());
  const auto full = full_gradients(model.plus(adapter.deltas(model)), rows);
  adapter.attach(model);
  const auto loss = model.loss(golden_tensor("tokens"));
  (loss.sum / static_cast<double>(loss.count)).backward();
  for (size_t i = 0; i < adapter.targets().size(); ++i) {
    const std::string& path = adapter.targets()[i].slot.path;
    const auto state = adapter.function(i).state();
    const at::Tensor a = state[0].second, b = state[1].second, g = full.at(path + ".weight");
    const at::Tensor own = adapter.function(i).parameters()[0].second.grad();
    // float32 on both sides through two layers
    EXPECT_LT(models::relative_error(own, at::matmul(at::matmul(b.t(), g), a.t())), 1e-4) << path;
    // A step along it is the closest of its form to one along the full gradient: what is left is orthogonal to all.
    const at::Tensor left = at::matmul(at::matmul(b, own), a) - g;
    EXPECT_LT(at::matmul(at::matmul(b.t(), left), a.t()).abs().max().item<double>(),
              1e-4 * g.abs().max().item<double>())
        << path;
  }
}

TEST(LoraSb, KeepsThePromisesOfATypeOfAdapter) {
  AdapterConfig config = sb_config();
  config.rank_pattern = {{"q_proj", 5}};
  expect_linear_promises(config, {}, /*differs=*/false);
}

TEST(LoraSb, ItsFileForPeftIsALoraOfTheSameChange) {
  AdapterConfig config = sb_config();
  config.rank_pattern = {{"q_proj", 5}};
  const models::Decoder base = golden_base();
  const Adapter adapter = trained_adapter(config, base);
  const TemporaryDirectory directory;
  adapter.save(directory.path());
  const Adapter lora = Adapter::load(directory.path(), base, std::nullopt, at::kCPU);
  EXPECT_EQ(lora.config().type, "lora");
  const auto expected = adapter.deltas(base), found = lora.deltas(base);
  ASSERT_EQ(found.size(), expected.size());
  for (size_t i = 0; i < found.size(); ++i)
    expect_close(found[i].second.detach(), expected[i].second, expected[i].first);
}

TEST(LoraSb, IsRefusedWithoutExamplesAndWithAnotherScaleOrStart) {
  const models::Decoder base = golden_base();
  EXPECT_THAT(models::thrown<core::UserError>([&] { (void)Adapter::create(sb_config(), base, 1, at::kCPU); }),
              HasSubstr("lora_sb starts from examples"));
  checked_config({{"type", "lora_sb"}, {"rank", 32}, {"alpha", 32}, {"options", {{"examples", 2}}}});
  checked_config({{"type", "lora_sb"}, {"rank", 32}});
  expect_refused({{"type", "lora_sb"}, {"rank", 32}, {"alpha", 16}}, "scale 1");
  expect_refused({{"type", "lora_sb"}, {"use_rslora", true}}, "scale 1");
  expect_refused({{"type", "lora_sb"}, {"init", "pissa"}}, "leave init out");
  expect_refused({{"type", "lora_sb"}, {"options", {{"examples", 0}}}}, "at least 1");
}

}  // namespace
}  // namespace moraine::algorithms::adapters
