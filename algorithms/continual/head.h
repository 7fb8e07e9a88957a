#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

#include "algorithms/continual/learner.h"

namespace moraine::algorithms::continual {

/// A linear head with one row per class that was trained; it grows with the stream, so the number of classes to come
/// does not leak into it.
struct Head {
  std::vector<int64_t> labels;
  at::Tensor weight, bias;  // [labels, d], [labels], float32; undefined while there is no class

  /// "head.weight" and "head.bias" of an artefact, labels from its meta data, on `device`.
  static Head read(const core::Artefact& artefact, at::Device device);
  /// Weight and bias rows of `wanted`; a class without a row gets its initial one: normal(0, 0.02) from (seed, label),
  /// bias 0.
  std::pair<at::Tensor, at::Tensor> rows(std::span<const int64_t> wanted, uint64_t seed, int64_t width,
                                         at::Device device) const;
  /// Replaces or adds the rows of `trained`.
  void set(std::span<const int64_t> trained, const at::Tensor& weight_rows, const at::Tensor& bias_rows);
};

/// Trains `parameters`, which `vit` uses, and the head rows of spec.logits by cross entropy over these logits on the
/// training images of spec.tasks. The batch of a step is a pure function of (seed, step); labels outside spec.logits do
/// not occur. Returns the artefact of kind `kind`: what state() names, the head of every class seen, and the curve.
/// `own` says how often this worker saves and logs; how to train stands in the unit.
core::ArtefactPtr train_head_and(const std::string& kind, const Unit& unit, const LearnerSite& site,
                                 const TrainConfig& own, models::NamedTensors parameters, Head head, models::Vit& vit,
                                 const std::function<models::NamedTensors()>& state,
                                 std::vector<ParameterGroup> groups = {});

/// spec of such a unit: tasks to train on, logits, seeds and training.
core::Json training_spec(const TrainConfig& train, const StreamFacts& stream, int64_t first_task, int64_t last_task,
                         bool local_logits, int64_t seed);
/// Images that training passes through the network.
double trained_images(const TrainConfig& train);
/// `train` with its steps multiplied by the number of tasks of spec.tasks: joint training's equal budget per image.
TrainConfig scaled_training(const TrainConfig& train, const core::Json& spec);

/// features(images) times the head's rows.
class HeadClassifier : public Classifier {
 public:
  HeadClassifier(Head head, uint64_t seed, int64_t width, at::Device device)
      : head_(std::move(head)), seed_(seed), width_(width), device_(device) {}
  bool knows(int64_t) const override { return true; }  // at its initial value, if need be
  at::Tensor scores(const at::Tensor& images, std::span<const int64_t> labels) override;

 protected:
  virtual at::Tensor features(const at::Tensor& images) = 0;

 private:
  Head head_;
  uint64_t seed_;
  int64_t width_;
  at::Device device_;
};

}  // namespace moraine::algorithms::continual
