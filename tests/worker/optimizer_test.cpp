#include "worker/optimizer.h"

#include <cmath>
#include <limits>
#include <numbers>
#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "tests/worker/tiny_job.h"

namespace moraine::worker {
namespace {

constexpr int64_t kSizes[] = {3, 50};  // one shorter than a vector register, one with a tail

double gradient_at(int64_t tensor, int64_t i, int64_t step) {
  return std::cos(0.3 * double(i) + double(tensor) + 1.7 * double(step));
}

models::NamedTensors make_parameters() {
  models::NamedTensors parameters;
  for (int64_t t = 0; t < 2; ++t) {
    at::Tensor tensor = at::empty({kSizes[t]}, at::kFloat);
    for (int64_t i = 0; i < kSizes[t]; ++i) tensor.data_ptr<float>()[i] = float(0.1 * double(i + 1) - double(t));
    parameters.emplace_back("p" + std::to_string(t), tensor.set_requires_grad(true));
  }
  return parameters;
}

void set_gradients(const models::NamedTensors& parameters, int64_t step) {
  for (size_t t = 0; t < parameters.size(); ++t) {
    const at::Tensor& tensor = parameters[t].second;
    at::Tensor gradient = at::empty(tensor.sizes(), at::kFloat);
    for (int64_t i = 0; i < tensor.numel(); ++i)
      gradient.data_ptr<float>()[i] = float(gradient_at(int64_t(t), i, step));
    tensor.mutable_grad() = gradient;
  }
}

std::vector<double> start_values() {
  std::vector<double> values;
  for (int64_t t = 0; t < 2; ++t)
    for (int64_t i = 0; i < kSizes[t]; ++i) values.push_back(float(0.1 * double(i + 1) - double(t)));
  return values;
}

/// Clipped gradients of a step in double precision, written from the definition.
std::vector<double> clipped_gradients(int64_t step, double clip_norm) {
  std::vector<double> gradients;
  double squares = 0;
  for (int64_t t = 0; t < 2; ++t)
    for (int64_t i = 0; i < kSizes[t]; ++i) gradients.push_back(gradient_at(t, i, step));
  for (double g : gradients) squares += g * g;
  const double clip = std::min(1.0, clip_norm / (std::sqrt(squares) + 1e-6));
  for (double& g : gradients) g *= clip;
  return gradients;
}

void expect_close(const models::NamedTensors& parameters, const std::vector<double>& expected) {
  const std::vector<float> actual = testing::flat(parameters);
  ASSERT_EQ(actual.size(), expected.size());
  // Five float32 updates of values near 1: a few units in the last place (6e-8) each.
  for (size_t i = 0; i < actual.size(); ++i)
    EXPECT_NEAR(actual[i], expected[i], 2e-6 * (1 + std::abs(expected[i]))) << i;
}

TEST(Optimizer, AdamWEqualsItsDefinitionInDoublePrecision) {
  algorithms::TrainConfig config;
  config.weight_decay = 0.1;
  const models::NamedTensors parameters = make_parameters();
  Optimizer optimizer(config, parameters);
  std::vector<double> expected = start_values(), m(expected.size()), v(expected.size());
  for (int64_t step = 1; step <= 5; ++step) {
    const double rate = 0.02 * double(step);
    set_gradients(parameters, step);
    scale_and_clip_gradients(optimizer.parameters(), 1, 2.0);
    optimizer.step(rate);
    const std::vector<double> g = clipped_gradients(step, 2.0);
    for (size_t i = 0; i < expected.size(); ++i) {
      expected[i] *= 1 - rate * 0.1;
      m[i] = 0.9 * m[i] + 0.1 * g[i];
      v[i] = 0.95 * v[i] + 0.05 * g[i] * g[i];
      const double m_hat = m[i] / (1 - std::pow(0.9, double(step))), v_hat = v[i] / (1 - std::pow(0.95, double(step)));
      expected[i] -= rate * m_hat / (std::sqrt(v_hat) + 1e-8);
    }
  }
  expect_close(parameters, expected);
}

TEST(Optimizer, SgdWithMomentumEqualsItsDefinitionInDoublePrecision) {
  algorithms::TrainConfig config;
  config.optimizer = "sgd";
  config.momentum = 0.8;
  config.weight_decay = 0.05;
  const models::NamedTensors parameters = make_parameters();
  Optimizer optimizer(config, parameters);
  std::vector<double> expected = start_values(), buffer(expected.size());
  for (int64_t step = 1; step <= 5; ++step) {
    set_gradients(parameters, step);
    optimizer.step(0.1);
    const std::vector<double> g = clipped_gradients(step, std::numeric_limits<double>::infinity());
    for (size_t i = 0; i < expected.size(); ++i) {
      buffer[i] = 0.8 * buffer[i] + g[i] + 0.05 * expected[i];
      expected[i] -= 0.1 * buffer[i];
    }
  }
  expect_close(parameters, expected);
}

TEST(Optimizer, ParameterWithoutGradientKeepsItsValueAndItsState) {
  algorithms::TrainConfig config;
  config.weight_decay = 0.1;
  const models::NamedTensors parameters = make_parameters();
  Optimizer optimizer(config, parameters);
  set_gradients(parameters, 1);
  parameters[0].second.mutable_grad().reset();
  const std::vector<float> before = testing::flat(parameters);
  optimizer.step(0.1);
  const std::vector<float> after = testing::flat(parameters);
  for (size_t i = 0; i < before.size(); ++i) EXPECT_EQ(before[i] == after[i], i < size_t(kSizes[0])) << i;
  for (const auto& [name, tensor] : optimizer.state()) {
    if (name.ends_with("/step")) {
      EXPECT_EQ(tensor.item<float>(), name == "p0/step" ? 0 : 1);
    }
  }
  EXPECT_FALSE(parameters[1].second.grad().defined()) << "a step forgets the gradients it used";
}

TEST(Optimizer, AGroupMovesAsAnOptimizerOfItsOwnWould) {
  for (const std::string name : {"adamw", "sgd"}) {
    algorithms::TrainConfig config;
    config.optimizer = name;
    config.weight_decay = 0.1;
    const models::NamedTensors together = make_parameters(), apart = make_parameters();
    Optimizer grouped(config, together, {{{"p1"}, 16.0, 0.0}});
    Optimizer first(config, {apart[0]});
    config.weight_decay = 0;
    Optimizer second(config, {apart[1]});
    for (int64_t step = 0; step < 3; ++step) {
      set_gradients(together, step);
      set_gradients(apart, step);
      grouped.step(1e-2);
      first.step(1e-2);
      second.step(16e-2);
    }
    EXPECT_EQ(testing::flat(together), testing::flat(apart)) << name;
  }
}

TEST(Optimizer, AGroupOfUnknownOrTwiceNamedParametersIsRefused) {
  EXPECT_THROW(Optimizer({}, make_parameters(), {{{"p9"}, 1.0, {}}}), core::InternalError);
  EXPECT_THROW(Optimizer({}, make_parameters(), {{{"p0"}, 1.0, {}}, {{"p0"}, 2.0, {}}}), core::InternalError);
}

TEST(Optimizer, RefusesTensorsThatAreNotFloat32Leaves) {
  const algorithms::TrainConfig config;
  EXPECT_THROW(Optimizer(config, {{"half", at::zeros({2}, at::kBFloat16).set_requires_grad(true)}}),
               core::InternalError);
  EXPECT_THROW(Optimizer(config, {{"frozen", at::zeros({2}, at::kFloat)}}), core::InternalError);
}

TEST(GradientClipping, ReturnsTheNormBeforeClippingAndBoundsTheNormAfter) {
  const models::NamedTensors parameters = {{"a", at::zeros({4}, at::kFloat).set_requires_grad(true)}};
  const std::vector<at::Tensor> leaves = {parameters[0].second};
  leaves[0].mutable_grad() = at::full({4}, 6.0, at::kFloat);
  EXPECT_DOUBLE_EQ(scale_and_clip_gradients(leaves, 0.5, 1.5), 6.0);  // 0.5 * sqrt(4 * 36)
  EXPECT_NEAR(leaves[0].grad()[0].item<double>(), 0.75, 1e-6);        // 3 * 1.5 / 6
  EXPECT_NEAR(scale_and_clip_gradients(leaves, 1, 0), 1.5, 1e-6);
  EXPECT_NEAR(leaves[0].grad()[0].item<double>(), 0.75, 1e-6) << "0 turns clipping off";
  leaves[0].mutable_grad()[1] = std::numeric_limits<float>::infinity();
  EXPECT_FALSE(std::isfinite(scale_and_clip_gradients(leaves, 1, 1)));
  EXPECT_NEAR(leaves[0].grad()[0].item<double>(), 0.75, 1e-6);
}

TEST(LearningRate, FollowsTheClosedFormsAndEndsAtTheFinalRatio) {
  algorithms::TrainConfig config;
  config.steps = 11;
  config.warmup_steps = 2;
  config.learning_rate = 4;
  config.final_lr_ratio = 0.25;
  for (const std::string schedule : {"constant", "linear", "cosine"}) {
    config.schedule = schedule;
    EXPECT_DOUBLE_EQ(learning_rate(config, 0), 2) << schedule;
    EXPECT_DOUBLE_EQ(learning_rate(config, 1), 4) << schedule;
    EXPECT_DOUBLE_EQ(learning_rate(config, 2), 4) << schedule;
    EXPECT_DOUBLE_EQ(learning_rate(config, 10), schedule == "constant" ? 4 : 1) << schedule;
  }
  config.schedule = "linear";
  EXPECT_DOUBLE_EQ(learning_rate(config, 6), 2.5);  // half way
  config.schedule = "cosine";
  EXPECT_DOUBLE_EQ(learning_rate(config, 6), 2.5);
  EXPECT_DOUBLE_EQ(learning_rate(config, 4), 1 + 1.5 * (1 + std::cos(std::numbers::pi / 4)));  // a quarter of the way
  config.steps = 3;
  EXPECT_DOUBLE_EQ(learning_rate(config, 2), 4) << "a single step after warm-up runs at the peak";
}

}  // namespace
}  // namespace moraine::worker
