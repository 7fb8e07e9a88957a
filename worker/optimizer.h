#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include <ATen/core/Tensor.h>

#include "algorithms/worker_context.h"
#include "models/slot.h"

namespace moraine::worker {

/// Learning rate of step `step` (from 0) of config.steps. With w = warmup_steps, n = steps, f = final_lr_ratio:
///
///   step < w:  learning_rate * (step + 1) / w
///   after:     learning_rate * g(p),  p = (step - w) / max(1, n - 1 - w)   so that the last step runs at g(1)
///   g:         constant 1;  linear 1 - (1 - f) p;  cosine f + (1 - f) (1 + cos(pi p)) / 2
double learning_rate(const algorithms::TrainConfig& config, int64_t step);

/// Multiplies the gradients of `parameters` in place by `scale` and then, if clip_norm > 0, by
/// min(1, clip_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_. Returns `norm`, the global L2 norm after
/// scaling and before clipping. A non-finite norm leaves the gradients alone.
/// Parameters that received no gradient are skipped.
double scale_and_clip_gradients(std::span<const at::Tensor> parameters, double scale, double clip_norm);

/// AdamW (decoupled weight decay, bias correction: the update of torch.optim.AdamW) or SGD with momentum
/// (torch.optim.SGD, dampening 0, decay added to the gradient) on float32 leaves, in one fused pass over all of them.
/// Weight decay applies to every parameter unless its group says otherwise. A parameter without a gradient is not
/// updated and its state does not move. Deterministic for a given thread count. Not thread-safe.
class Optimizer {
 public:
  /// Throws InternalError if a parameter is not a float32 leaf that requires a gradient, or a group names one that is
  /// not there or stands in two.
  Optimizer(const algorithms::TrainConfig& config, const models::NamedTensors& parameters,
            const std::vector<algorithms::ParameterGroup>& groups = {});

  /// One update at `learning_rate` from the gradients the leaves hold; then forgets the gradients.
  void step(double learning_rate);
  const std::vector<at::Tensor>& parameters() const { return parameters_; }
  /// Everything a resumed run needs, float32: "<name>/exp_avg", "<name>/exp_avg_sq", "<name>/step"; "<name>/momentum".
  /// Live tensors: copying into them restores the state.
  models::NamedTensors state() const;

 private:
  struct Group {
    double lr_factor = 1, weight_decay = 0;
    std::vector<size_t> members;  // by index
  };
  void step(const Group& group, double learning_rate);

  std::vector<std::string> names_;
  std::vector<at::Tensor> parameters_;
  bool adamw_;
  double beta1_, beta2_, epsilon_, momentum_;
  std::vector<Group> groups_;                       // the last one holds who stands in none
  std::vector<at::Tensor> first_, second_, steps_;  // SGD: first_ is the momentum buffer, the others stay empty
};

}  // namespace moraine::worker
