#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

#include "algorithms/continual/learner.h"
#include "core/artefact.h"
#include "models/backbone.h"

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

/// A model's features times its head's rows; those that were never trained come from `seed`.
class HeadClassifier final : public Classifier {
 public:
  HeadClassifier(std::unique_ptr<models::Backbone> model, Head head, uint64_t seed)
      : model_(std::move(model)), head_(std::move(head)), seed_(seed) {}
  bool knows(int64_t) const override { return true; }  // at its initial value, if need be
  at::Tensor scores(const models::Input& batch, std::span<const int64_t> labels, std::optional<int64_t> task) override;

 private:
  std::unique_ptr<models::Backbone> model_;
  Head head_;
  uint64_t seed_;
};

}  // namespace moraine::algorithms::continual
