#include "worker/optimizer.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numbers>
#include <utility>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/_fused_sgd.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/accumulate.h>
#include <fmt/format.h>

#include "core/error.h"

namespace moraine::worker {

double learning_rate(const algorithms::TrainConfig& config, int64_t step) {
  const int64_t warmup = config.warmup_steps;
  if (step < warmup) return config.learning_rate * static_cast<double>(step + 1) / static_cast<double>(warmup);
  const double progress =
      static_cast<double>(step - warmup) / static_cast<double>(std::max<int64_t>(1, config.steps - 1 - warmup));
  const double last = config.final_lr_ratio;
  double factor = 1;
  if (config.schedule == "linear") factor = 1 - (1 - last) * progress;
  if (config.schedule == "cosine") factor = last + (1 - last) * (1 + std::cos(std::numbers::pi * progress)) / 2;
  return config.learning_rate * factor;
}

double scale_and_clip_gradients(std::span<const at::Tensor> parameters, double scale, double clip_norm) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> gradients;
  for (const at::Tensor& parameter : parameters) {
    if (parameter.grad().defined()) gradients.push_back(parameter.grad());
  }
  if (gradients.empty()) return 0;
  const double norm = scale * at::linalg_vector_norm(at::stack(at::_foreach_norm(gradients))).item<double>();
  if (!std::isfinite(norm)) return norm;
  const double clip = clip_norm > 0 ? std::min(1.0, clip_norm / (norm + 1e-6)) : 1.0;
  if (scale * clip != 1.0) at::_foreach_mul_(gradients, scale * clip);
  return norm;
}

Optimizer::Optimizer(const algorithms::TrainConfig& config, const models::NamedTensors& parameters,
                     const std::vector<algorithms::ParameterGroup>& groups,
                     std::shared_ptr<algorithms::UpdateSpace> space)
    : space_(std::move(space)),
      adamw_(config.optimizer != "sgd"),
      eight_bit_(config.optimizer == "adamw8bit"),
      beta1_(config.beta1),
      beta2_(config.beta2),
      epsilon_(config.epsilon),
      momentum_(config.momentum) {
  for (const auto& [name, tensor] : parameters) {
    MORAINE_CHECK(tensor.scalar_type() == at::kFloat && tensor.is_leaf() && tensor.requires_grad(),
                  "a trained tensor must be a float32 leaf that requires a gradient: {}", name);
    names_.push_back(name);
    parameters_.push_back(tensor);
    const auto shape = space_ ? space_->shape(name) : std::nullopt;
    in_space_.push_back(shape.has_value());
    keep_moments(shape ? at::IntArrayRef(*shape) : tensor.sizes(), tensor.device());
  }
  make_groups(config, groups);
}

void Optimizer::keep_moments(at::IntArrayRef sizes, at::Device device) {
  const auto options = at::TensorOptions(at::kFloat).device(device);
  quantized_.emplace_back();
  if (eight_bit_ && c10::multiply_integers(sizes) >= kMin8Bit) {
    quantized_.back().emplace(Quantized{{sizes, true, device}, {sizes, false, device}});
    first_.emplace_back();
    second_.emplace_back();
  } else {
    if (adamw_ || momentum_ != 0) first_.push_back(at::zeros(sizes, options));
    if (adamw_) second_.push_back(at::zeros(sizes, options));
  }
  if (adamw_) steps_.push_back(at::zeros(at::IntArrayRef{}, options));
}

void Optimizer::make_groups(const algorithms::TrainConfig& config,
                            const std::vector<algorithms::ParameterGroup>& groups) {
  std::map<std::string, size_t> left;
  for (size_t i = 0; i < names_.size(); ++i) left[names_[i]] = i;
  for (const auto& group : groups) {
    Group& own = groups_.emplace_back(group.lr_factor, group.weight_decay.value_or(config.weight_decay));
    for (const std::string& name : group.names) {
      const auto found = left.find(name);
      MORAINE_CHECK(found != left.end(), "a group of parameters names '{}', which is not there or in another group",
                    name);
      own.members.push_back(found->second);
      left.erase(found);
    }
  }
  Group& others = groups_.emplace_back(1.0, config.weight_decay);
  for (size_t i = 0; i < names_.size(); ++i)
    if (left.contains(names_[i])) others.members.push_back(i);
  group_of_.resize(names_.size());
  for (size_t group = 0; group < groups_.size(); ++group)
    for (const size_t member : groups_[group].members) group_of_[member] = group;
}

void Optimizer::step(double learning_rate) {
  const at::NoGradGuard no_grad;
  for (const Group& group : groups_) step(group, group.members, learning_rate * group.lr_factor);
}

void Optimizer::step_one(size_t parameter, double learning_rate) {
  const at::NoGradGuard no_grad;
  const Group& group = groups_[group_of_[parameter]];
  step(group, {parameter}, learning_rate * group.lr_factor);
}

void Optimizer::step(const Group& group, const std::vector<size_t>& members, double learning_rate) {
  std::vector<at::Tensor> parameters, gradients, first, second, steps;
  for (const size_t i : members) {
    if (!parameters_[i].grad().defined()) continue;
    if (in_space_[i] || quantized_[i]) {
      step_alone(i, group, learning_rate);
      continue;
    }
    parameters.push_back(parameters_[i]);
    gradients.push_back(parameters_[i].grad());
    if (!first_.empty()) first.push_back(first_[i]);
    if (adamw_) {
      second.push_back(second_[i]);
      steps.push_back(steps_[i]);
    }
  }
  if (parameters.empty()) return;
  update(parameters, gradients, first, second, steps, learning_rate, group.weight_decay);
  for (const at::Tensor& parameter : parameters) parameter.mutable_grad().reset();
}

void Optimizer::step_alone(size_t i, const Group& group, double learning_rate) {
  const at::Tensor& parameter = parameters_[i];
  const at::Tensor gradient =
      in_space_[i] ? space_->project(names_[i], parameter.grad()).contiguous() : parameter.grad();
  parameter.mutable_grad().reset();
  const at::Tensor moving = in_space_[i] ? at::zeros_like(gradient) : parameter;
  std::vector<at::Tensor> first, second, steps;
  if (quantized_[i]) {
    first = {quantized_[i]->first.values()};
    second = {quantized_[i]->second.values()};
  } else {
    if (!first_.empty()) first = {first_[i]};
    if (adamw_) second = {second_[i]};
  }
  if (adamw_) steps = {steps_[i]};
  update({moving}, {gradient}, first, second, steps, learning_rate, in_space_[i] ? 0 : group.weight_decay);
  if (quantized_[i]) {
    quantized_[i]->first.store(first[0]);
    quantized_[i]->second.store(second[0]);
  }
  if (!in_space_[i]) return;
  parameter.add_(space_->project_back(names_[i], moving));
  if (group.weight_decay != 0) parameter.mul_(1 - learning_rate * group.weight_decay);
}

void Optimizer::update(const std::vector<at::Tensor>& moving, const std::vector<at::Tensor>& gradients,
                       const std::vector<at::Tensor>& first, const std::vector<at::Tensor>& second,
                       const std::vector<at::Tensor>& steps, double learning_rate, double weight_decay) const {
  if (adamw_) {
    at::_foreach_add_(steps, 1);
    at::_fused_adamw_(moving, gradients, first, second, /*max_exp_avg_sqs=*/{}, steps, learning_rate, beta1_, beta2_,
                      weight_decay, epsilon_, /*amsgrad=*/false, /*maximize=*/false);
  } else {
    // Never "the first step": a buffer that starts at zero takes over the first gradient as it is when dampening is 0.
    at::_fused_sgd_(moving, gradients, first, weight_decay, momentum_, learning_rate, /*dampening=*/0,
                    /*nesterov=*/false, /*maximize=*/false, /*is_first_step=*/false);
  }
}

models::NamedTensors Optimizer::state() const {
  models::NamedTensors state = space_ ? space_->state() : models::NamedTensors();
  for (size_t i = 0; i < names_.size(); ++i) {
    const auto keep = [&](const char* what, const at::Tensor& tensor) {
      state.emplace_back(fmt::format("{}/{}", names_[i], what), tensor);
    };
    if (quantized_[i]) {
      keep("exp_avg/codes", quantized_[i]->first.codes());
      keep("exp_avg/scales", quantized_[i]->first.scales());
      keep("exp_avg_sq/codes", quantized_[i]->second.codes());
      keep("exp_avg_sq/scales", quantized_[i]->second.scales());
    } else if (adamw_) {
      keep("exp_avg", first_[i]);
      keep("exp_avg_sq", second_[i]);
    } else if (!first_.empty()) {
      keep("momentum", first_[i]);
    }
    if (adamw_) keep("step", steps_[i]);
  }
  return state;
}

int64_t Optimizer::state_bytes() const {
  int64_t bytes = 0;
  for (const auto& [name, tensor] : state()) bytes += static_cast<int64_t>(tensor.nbytes());
  return bytes;
}

}  // namespace moraine::worker
