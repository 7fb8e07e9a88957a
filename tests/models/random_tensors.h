#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "models/decoder.h"

namespace moraine::models {

/// Normal(0, deviation) float64 values that depend on the seed alone.
at::Tensor random_tensor(const std::vector<int64_t>& shape, uint64_t seed, double deviation = 1.0);
/// Uniform tokens in [0, vocab), [batch, length] int64.
at::Tensor random_tokens(int64_t batch, int64_t length, int64_t vocab, uint64_t seed);

/// max |a - b| / max |b|; infinite when shapes differ or anything is NaN.
double relative_error(const at::Tensor& a, const at::Tensor& b);
/// Same dtype, shape and bytes.
bool same_bits(const at::Tensor& a, const at::Tensor& b);

/// A two-layer model of a few thousand parameters with weights large enough that every branch matters.
DecoderConfig tiny_config(DecoderConfig::Family family);

/// The message and hint of the Error of type E that `action` throws, "" when it throws none.
template <typename E, typename Action>
std::string thrown(Action&& action) {
  try {
    action();
  } catch (const E& error) {
    return std::string(error.what()) + "\n" + error.hint();
  }
  return "";
}

}  // namespace moraine::models
