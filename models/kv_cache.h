#pragma once

#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

namespace moraine::models {

/// Keys and values of all tokens that a decoder has read, by layer, so that a further token costs one row of every
/// matrix product instead of the whole text again (Decoder::next_logits).
///
/// Belongs to one decoder with one set of attached functions, and to one batch of sequences of equal length. Memory:
/// 2 * layers * batch * kv_heads * head_dim numbers per token, and up to as much again in reserve. Nothing in it
/// requires gradients. After an exception out of next_logits it is of no more use.
class KeyValueCache {
 public:
  /// Tokens of every sequence that all layers have seen.
  int64_t length() const { return layers_.empty() ? 0 : layers_.back().length; }

  struct Layer {
    at::Tensor keys, values;  // [B, kv_heads, reserved, head_dim]; the first `length` positions are filled
    int64_t length = 0;
  };
  const Layer& layer(size_t index) const { return layers_.at(index); }
  /// Adds keys (after rotation) and values of T further tokens to a layer, [B, T, kv_heads, head_dim] both. Layers are
  /// filled in order. Throws InternalError if they are not, or if the batch is another than before.
  void append(size_t layer, const at::Tensor& keys, const at::Tensor& values);

 private:
  std::vector<Layer> layers_;
};

}  // namespace moraine::models
