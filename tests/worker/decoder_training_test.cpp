#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <gtest/gtest.h>

#include "algorithms/adapters/adapter.h"
#include "core/error.h"
#include "models/decoder.h"
#include "tests/worker/tiny_job.h"
#include "worker/context.h"

namespace moraine::worker {
namespace {

models::DecoderConfig tiny_config() {
  models::DecoderConfig config;
  config.vocab_size = 24;
  config.hidden_size = 16;
  config.intermediate_size = 32;
  config.num_layers = 2;
  config.num_heads = config.num_kv_heads = 4;
  config.head_dim = 4;
  config.initializer_range = 0.5;  // the head is frozen: with rows near zero no adapter could move the logits
  return config;
}

/// Counting sequences: the next token follows from the one before.
at::Tensor counting_batch(int64_t step, int64_t first, int64_t num) {
  return at::arange(9).add(at::arange(num).add(first + 3 * step).unsqueeze(1)).remainder(24);
}

class DecoderTraining : public ::testing::TestWithParam<at::ScalarType> {
 protected:
  algorithms::TrainOutcome train(DirectContext& context, models::Decoder& model,
                                 const models::NamedTensors& parameters) {
    algorithms::TrainJob job;
    job.config.steps = 30;
    job.config.batch_size = 8;
    job.config.micro_batch_size = 4;
    job.config.learning_rate = 0.02;
    job.config.checkpoint_every = 10;
    job.parameters = parameters;
    job.loss = [&](int64_t step, int64_t first, int64_t num) {
      if (step == stop_at_) signals_ = 1;
      const auto loss = model.loss(counting_batch(step, first, num));
      return algorithms::TrainJob::MicroLoss{loss.sum, loss.count};
    };
    return context.train(job);
  }
  DirectContext context() {
    return {unit_,
            1,
            options_,
            signals_,
            {.artefact = nullptr, .metric = [](const core::metrics::Record&) {}, .progress = [](double, double) {}}};
  }

  algorithms::Unit unit_{.kind = "train", .label = "train/lora", .spec = {}, .inputs = {}};
  WorkerOptions options_;
  std::atomic<int> signals_ = 0;
  int64_t stop_at_ = -1;
};

TEST_P(DecoderTraining, LoraLearnsInFloat32OnAFrozenBaseAndResumesWithTheSameBits) {
  const models::Decoder base = models::Decoder::from_config(tiny_config(), 1, GetParam());
  std::map<std::string, at::Tensor> before;
  for (const auto& [name, weight] : base.weights()) before[name] = weight.clone();
  const auto attached = [&](models::Decoder& model) {
    algorithms::adapters::AdapterConfig config;
    config.use_rslora = true;
    auto adapter = algorithms::adapters::Adapter::create(config, model.slots(), 2, at::kCPU);
    adapter.attach(model);
    return adapter;
  };

  models::Decoder model = base.share();
  const auto adapter = attached(model);
  DirectContext uninterrupted = context();
  const algorithms::TrainOutcome outcome = train(uninterrupted, model, adapter.parameters());
  EXPECT_LT(outcome.final_loss, 0.5 * outcome.curve.front().second);
  for (const auto& [name, tensor] : adapter.parameters()) EXPECT_EQ(tensor.scalar_type(), at::kFloat) << name;
  for (const auto& [name, weight] : base.weights()) EXPECT_TRUE(at::equal(weight, before.at(name))) << name;

  const testing::TempDirectory directory;
  options_.checkpoint_directory = directory.path();
  stop_at_ = 16;
  models::Decoder second_model = base.share();
  DirectContext stopped = context();
  EXPECT_THROW(train(stopped, second_model, attached(second_model).parameters()), core::StopRequested);
  signals_ = 0;
  stop_at_ = -1;
  models::Decoder third_model = base.share();
  const auto resumed_adapter = attached(third_model);
  DirectContext resumed = context();
  EXPECT_EQ(train(resumed, third_model, resumed_adapter.parameters()).curve, outcome.curve);
  EXPECT_EQ(testing::flat(resumed_adapter.parameters()), testing::flat(adapter.parameters()));
}

INSTANTIATE_TEST_SUITE_P(Base, DecoderTraining, ::testing::Values(at::kFloat, at::kBFloat16),
                         [](const auto& type) { return std::string(c10::toString(type.param)); });

}  // namespace
}  // namespace moraine::worker
