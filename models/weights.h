#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

#include "core/safetensors.h"
#include "models/shape.h"

namespace moraine::models {

/// A model's weights by Hugging Face name and the type it computes in.
struct Weights {
  std::map<std::string, at::Tensor> tensors;
  at::ScalarType dtype = at::kFloat;
};

/// Picks the `expected` tensors out of a checkpoint. Missing, left-over and mis-shaped keys are listed in one UserError
/// (of each kind the first twelve and the number of the others) that names `origin`. `dtype` (float32, bfloat16,
/// float64) converts; nullopt keeps the stored one, which must then be the same for all. The weights borrow the bytes
/// when an `owner` is given that keeps them alive, else they are copied.
Weights match_weights(const NamedShapes& expected, const std::vector<core::TensorView>& tensors,
                      const std::string& origin, std::optional<at::ScalarType> dtype,
                      const std::shared_ptr<const void>& owner);

/// Throws UserError if a config promises more layers, or experts in them, than the checkpoint has tensors: the list of
/// what is missing would not fit into memory. To be asked before that list is made.
void require_plausible_layers(int64_t layers, int64_t experts, size_t tensors, const std::string& origin);

/// The `expected` tensors of a checkpoint, in that order and as stored. Errors as match_weights().
std::vector<const core::TensorView*> match_tensors(const NamedShapes& expected,
                                                   const std::vector<core::TensorView>& tensors,
                                                   const std::string& origin);

/// Random weights: normal(0, deviation), weights of modules with "norm" in their name 1, biases 0; each tensor
/// from `seed` and its name alone.
Weights random_weights(const NamedShapes& expected, uint64_t seed, double deviation, at::ScalarType dtype);

}  // namespace moraine::models
