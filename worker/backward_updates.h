#pragma once

#include <vector>

#include <ATen/core/Tensor.h>

#include "worker/optimizer.h"

namespace moraine::worker {

/// Updates every parameter of an optimiser as soon as a backward pass has its whole gradient, and frees the gradient: a
/// step holds the gradients of one piece of the graph at a time (LOMO, arXiv 2306.09782; GaLore's per-layer updates).
/// The updates are those of Optimizer::step(), bit for bit.
///
///   updates.begin(1.0 / targets, rate);
///   loss.backward(...);
///   const double norm = updates.finish();
///
/// A gradient that is not finite updates nothing. Used by one thread; the hooks run where autograd runs. No other post
/// accumulate hook may sit on the parameters.
class BackwardUpdates {
 public:
  explicit BackwardUpdates(Optimizer& optimizer);
  ~BackwardUpdates();
  BackwardUpdates(const BackwardUpdates&) = delete;
  BackwardUpdates& operator=(const BackwardUpdates&) = delete;

  /// Gradients of the backward pass that follows are multiplied by `scale`.
  void begin(double scale, double learning_rate);
  /// The L2 norm of all scaled gradients since begin(); not finite if one was not.
  double finish();

 private:
  class Hook;
  void update(size_t parameter);

  Optimizer& optimizer_;
  bool running_ = false;
  double scale_ = 1, learning_rate_ = 0, squares_ = 0;
};

}  // namespace moraine::worker
