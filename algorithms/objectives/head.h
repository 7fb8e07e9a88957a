#pragma once

#include <cstdint>
#include <span>

#include <ATen/core/Tensor.h>

#include "core/artefact.h"
#include "models/open_backbone.h"

namespace moraine::algorithms::objectives {

/// A linear classifier on a backbone's features, trained beside whatever fits the backbone. Undefined for tasks that
/// need none.
struct Head {
  static constexpr const char* kPrefix = "head.";  // of its tensors in artefacts
  at::Tensor weight, bias;  // [classes, d], [classes]; float32. No bias where transformers' form of the model has none

  /// normal(0, 0.02) from `seed`, bias 0, as trainable leaves; empty for 0 classes.
  static Head fresh(int64_t classes, const models::ModelFacts& model, uint64_t seed, at::Device device);
  /// Of the tensors of a classifier (names that end in ".weight" and ".bias") as trainable leaves; empty for none.
  static Head start(std::span<const core::TensorView> classifier, at::Device device);
  /// Their number of classes, 0 for none. Throws UserError if they are no head of the model.
  static int64_t classes_of(std::span<const core::TensorView> classifier, const models::ModelFacts& model);
  /// Numbers in it.
  static int64_t count(int64_t classes, const models::ModelFacts& model);
  /// Of an artefact; empty when it holds none.
  static Head read(const core::Artefact& artefact, at::Device device);
  /// "head.bias", "head.weight"; none when empty.
  models::NamedTensors tensors() const;
  /// features [B, d] -> [B, classes] float32.
  at::Tensor logits(const at::Tensor& features) const;
};

}  // namespace moraine::algorithms::objectives
