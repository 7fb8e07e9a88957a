#include "tests/worker/tiny_job.h"

#include <cmath>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/tanh.h>

namespace moraine::worker::testing {
namespace {

at::Tensor waves(at::IntArrayRef shape, double frequency) {
  at::Tensor tensor = at::empty(shape, at::kFloat);
  for (int64_t i = 0; i < tensor.numel(); ++i)
    tensor.data_ptr<float>()[i] = static_cast<float>(std::sin(frequency * static_cast<double>(i + 1)));
  return tensor;
}

}  // namespace

algorithms::TrainJob tiny_job(int64_t steps) {
  algorithms::TrainJob job;
  job.config.steps = steps;
  job.config.batch_size = 6;
  job.config.warmup_steps = 2;
  job.config.weight_decay = 0.01;
  job.config.learning_rate = 0.05;
  job.config.checkpoint_every = 3;
  job.config.log_every = 4;
  job.tokens_per_sequence = 2;
  const at::Tensor inner = waves({5, 4}, 0.7).set_requires_grad(true),
                   outer = waves({1, 5}, 1.3).set_requires_grad(true);
  job.parameters = {{"inner", inner}, {"outer", outer}};
  job.loss = [inner, outer](int64_t step, int64_t first, int64_t num) {
    algorithms::TrainJob::MicroLoss loss;
    for (int64_t sequence = first; sequence < first + num; ++sequence) {
      const int64_t targets = 1 + sequence % 3;
      const at::Tensor x =
          waves({targets, 4}, 0.1 + 0.37 * static_cast<double>(sequence) + 0.013 * static_cast<double>(step));
      const at::Tensor error = at::matmul(at::tanh(at::matmul(x, inner.t())), outer.t()).sub(x.sum(1, true));
      const at::Tensor sum = error.square().sum();
      loss.sum = loss.sum.defined() ? loss.sum.add(sum) : sum;
      loss.count += targets;
    }
    return loss;
  };
  return job;
}

std::vector<float> flat(const models::NamedTensors& parameters) {
  std::vector<float> values;
  for (const auto& [name, tensor] : parameters) {
    const at::Tensor contiguous = tensor.detach().contiguous();
    values.insert(values.end(), contiguous.data_ptr<float>(), contiguous.data_ptr<float>() + contiguous.numel());
  }
  return values;
}

}  // namespace moraine::worker::testing
