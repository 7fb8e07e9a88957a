#pragma once

#include <cstdint>
#include <functional>
#include <span>

#include <ATen/core/Tensor.h>

#include "algorithms/adapters/config.h"
#include "algorithms/worker_context.h"
#include "models/backbone.h"

namespace moraine::algorithms::adapters {

/// What start values come from where Parametrisation::wants() something of examples. A procedure that has examples
/// gives one.
struct Calibration {
  using Each = std::function<void(size_t target, const at::Tensor& found)>;
  using OfTargets = std::function<void(std::span<const Target> targets, int64_t examples, const Each& each)>;
  /// Calls `each` once for every target, in their order, with the gradient of the mean loss over the first `examples`
  /// examples by the target's frozen weight: [out, in] float32.
  OfTargets gradients;
  double first_learning_rate = 0;  // of the first step of the training that follows
  /// The same with the sum of x x^T over the target's inputs x at all positions of these examples, none of them
  /// padding: [in, in] float64.
  OfTargets input_moments = nullptr;
};

/// The calibration of a training: its examples are those of its first steps, in their order, its losses those of
/// `model` as it is. `model` must outlive the result, and its target slots be free while gradients() runs.
///
/// Slots are taken in groups whose results fit 1 GiB, each with passes over all examples of its own, so memory does not
/// grow with the model. Inputs are those of one example a pass, which needs no padding. Every member of a group of
/// workers computes all of it: the result does not depend on their number. Throws NumericError naming the slot on
/// numbers that are not finite; gradients() UserError when no example has a target.
Calibration calibration_of(models::Backbone& model,
                           std::function<TrainJob::MicroLoss(int64_t step, int64_t first, int64_t count)> loss,
                           const TrainConfig& train);

}  // namespace moraine::algorithms::adapters
