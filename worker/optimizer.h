#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "algorithms/worker_context.h"
#include "models/slot.h"
#include "worker/blockwise_moment.h"

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
///
/// adamw8bit is AdamW whose moments of at least kMin8Bit values are kept in 8 bits (worker/blockwise_moment.h); an
/// update is computed in float32 from what was kept and what comes, then both moments are rounded.
///
/// Parameters in an UpdateSpace: the update rule moves zeros of the space's shape by the projected gradient, and what
/// they moved is brought back and added. Weight decay is decoupled there, of the whole parameter, after the update.
class Optimizer {
 public:
  /// Throws InternalError if a parameter is not a float32 leaf that requires a gradient, or a group names one that is
  /// not there or stands in two.
  Optimizer(const algorithms::TrainConfig& config, const models::NamedTensors& parameters,
            const std::vector<algorithms::ParameterGroup>& groups = {},
            std::shared_ptr<algorithms::UpdateSpace> space = nullptr);
  static constexpr int64_t kMin8Bit = 4096;

  /// One update at `learning_rate` from the gradients the leaves hold; then forgets the gradients.
  void step(double learning_rate);
  /// The same of one parameter, which has a gradient.
  void step_one(size_t parameter, double learning_rate);
  const std::vector<at::Tensor>& parameters() const { return parameters_; }
  /// Everything a resumed run needs: float32 "<name>/exp_avg", "<name>/exp_avg_sq", "<name>/step"; "<name>/momentum";
  /// of moments in 8 bits "<name>/exp_avg/codes" and "/scales"; and what the space keeps. Live tensors: copying into
  /// them restores the state.
  models::NamedTensors state() const;
  /// Bytes of all of state().
  int64_t state_bytes() const;

 private:
  struct Group {
    double lr_factor = 1, weight_decay = 0;
    std::vector<size_t> members;  // by index
  };
  struct Quantized {
    BlockwiseMoment first, second;
  };
  void keep_moments(at::IntArrayRef sizes, at::Device device);
  void make_groups(const algorithms::TrainConfig& config, const std::vector<algorithms::ParameterGroup>& groups);
  /// Of some of the group's members.
  void step(const Group& group, const std::vector<size_t>& members, double learning_rate);
  /// One parameter that lies in the space or whose moments are in 8 bits.
  void step_alone(size_t parameter, const Group& group, double learning_rate);
  /// The update rule on tensors that move together.
  void update(const std::vector<at::Tensor>& moving, const std::vector<at::Tensor>& gradients,
              const std::vector<at::Tensor>& first, const std::vector<at::Tensor>& second,
              const std::vector<at::Tensor>& steps, double learning_rate, double weight_decay) const;

  std::vector<std::string> names_;
  std::vector<at::Tensor> parameters_;
  std::shared_ptr<algorithms::UpdateSpace> space_;
  std::vector<bool> in_space_;
  bool adamw_, eight_bit_;
  double beta1_, beta2_, epsilon_, momentum_;
  std::vector<Group> groups_;     // the last one holds who stands in none
  std::vector<size_t> group_of_;  // of each parameter
  // SGD: first_ is the momentum buffer, the others stay empty. Undefined where quantized_ has the moments.
  std::vector<at::Tensor> first_, second_, steps_;
  std::vector<std::optional<Quantized>> quantized_;
};

}  // namespace moraine::worker
