#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/safetensors.h"
#include "models/checkpoint.h"

namespace moraine::models {

/// Tensors and whoever owns their bytes.
struct OwnedViews {
  std::vector<core::TensorView> tensors;
  std::shared_ptr<const void> owner;
};

/// A checkpoint's weights under Hugging Face's names, one tensor per expert, whatever layout they came in: Hugging
/// Face's own, transformers 5's packed experts (unpack_experts), or OLMo-core's, known by its blocks.0.* keys:
///
///   blocks.l.feed_forward_moe.experts.mlp.{w1, w3} [E d, h] and w2 [E h, d], each expert's rows transposed;
///   router.weight flat [E d]; router.expert_bias [E - 1, 1] must be zero, transformers' FlexOlmo has no place for it;
///   dense blocks feed_forward.{w1, w3, w2} as gate, up, down.
///
/// OLMo-core's experts are copied, everything else stays a view. Only the non-dropless layout: dropless ones stack w1
/// as [E h, d]. Throws UserError naming `origin` and the tensor for another shape. Source: FlexOlmo (arXiv 2507.07024),
/// OLMo-core's conversion to Hugging Face.
OwnedViews hugging_face_layout(const std::vector<core::TensorView>& tensors, std::shared_ptr<const void> owner,
                               const std::string& origin);

/// Weights named as Hugging Face names them (OLMo2, FlexOlmo; one tensor per expert) in OLMo-core's layout. Throws
/// UserError for a name OLMo-core has no place for.
std::vector<LazyTensor> to_olmo_core(std::vector<LazyTensor> tensors);

}  // namespace moraine::models
