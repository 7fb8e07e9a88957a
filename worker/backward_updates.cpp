#include "worker/backward_updates.h"

#include <cmath>
#include <memory>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

namespace moraine::worker {

class BackwardUpdates::Hook final : public torch::autograd::PostAccumulateGradHook {
 public:
  Hook(BackwardUpdates& updates, size_t parameter) : updates_(updates), parameter_(parameter) {}
  void operator()(const torch::autograd::Variable&) override { updates_.update(parameter_); }

 private:
  BackwardUpdates& updates_;
  size_t parameter_;
};

BackwardUpdates::BackwardUpdates(Optimizer& optimizer) : optimizer_(optimizer) {
  for (size_t i = 0; i < optimizer.parameters().size(); ++i)
    torch::autograd::impl::set_post_acc_grad_hooks(optimizer.parameters()[i], std::make_unique<Hook>(*this, i));
}

BackwardUpdates::~BackwardUpdates() {
  for (const at::Tensor& parameter : optimizer_.parameters())
    torch::autograd::impl::set_post_acc_grad_hooks(parameter, nullptr);
}

void BackwardUpdates::begin(double scale, double learning_rate) {
  running_ = true;
  scale_ = scale;
  learning_rate_ = learning_rate;
  squares_ = 0;
}

double BackwardUpdates::finish() {
  running_ = false;
  return std::sqrt(squares_);
}

void BackwardUpdates::update(size_t parameter) {
  if (!running_) return;
  const at::NoGradGuard no_grad;
  const at::Tensor& gradient = optimizer_.parameters()[parameter].grad();
  if (scale_ != 1) gradient.mul_(scale_);
  const double norm = at::linalg_vector_norm(gradient).item<double>();
  squares_ += norm * norm;
  if (std::isfinite(norm)) optimizer_.step_one(parameter, learning_rate_);
}

}  // namespace moraine::worker
