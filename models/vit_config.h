#pragma once

#include <cstdint>
#include <string>

#include "core/json.h"
#include "models/shape.h"

namespace moraine::models {

/// Whose blocks: they differ in names, LayerScale, SwiGLU and in what the classifier reads.
enum class VitFamily { kVit, kDinov2 };

/// Architecture of a vision transformer, as in a Hugging Face config.json of model type "vit" or "dinov2".
struct VitConfig {
  VitFamily family = VitFamily::kVit;
  int64_t image_size = 224, patch_size = 16, num_channels = 3;
  int64_t hidden_size = 768, intermediate_size = 3072, num_layers = 12, num_heads = 12;
  std::string hidden_act = "gelu";  // gelu (exact) | gelu_new, gelu_pytorch_tanh (both: tanh approximation)
  bool qkv_bias = true;
  double layer_norm_eps = 1e-12, initializer_range = 0.02;
  double mlp_ratio = 4;           // dinov2: hidden_size * mlp_ratio gives intermediate_size
  bool swiglu = false;            // dinov2: silu(u) * v, with [u, v] of one matrix, in place of hidden_act
  double layerscale_value = 1.0;  // dinov2: initial value of lambda1, which scales what a branch adds
  int64_t num_labels = 0;         // rows of the classifier; 0 = a backbone without one

  /// Hugging Face's config.json; absent keys take the defaults of transformers 4.57 for its model type. Throws one
  /// UserError naming `origin` and every key that is of the wrong type, out of range or not implemented. num_labels
  /// becomes 0: the weights say whether there is a classifier.
  static VitConfig from_json(const core::Json& json, const std::string& origin);
  /// timm's config.json ("architecture": "vit_..."), which names no shapes: they are taken from its weights, the number
  /// of heads from the architecture's name (tiny 3, small 6, base 12, large and huge 16) or model_args.num_heads.
  /// Throws UserError.
  static VitConfig from_timm(const core::Json& json, const NamedShapes& shapes, const std::string& origin);
  /// A config.json that transformers reads.
  core::Json to_json() const;

  /// What the classifier reads: the CLS token [d]; of dinov2 also the mean of the patches' tokens, [2 d].
  int64_t classifier_width() const { return family == VitFamily::kDinov2 ? 2 * hidden_size : hidden_size; }
  int64_t num_patches() const { return (image_size / patch_size) * (image_size / patch_size); }
  /// Parameters without the classifier.
  int64_t backbone_parameters() const;
};

/// Where the parts of a block that are called differently stand behind "encoder.layer.N.".
struct VitBlockNames {
  const char *norm_before, *norm_after, *up, *down;
};
VitBlockNames block_names(const VitConfig& config);

/// Names and shapes of a ViTModel or Dinov2Model without mask token and pooler (plus "classifier" when num_labels > 0),
/// sorted by name.
NamedShapes expected_tensors(const VitConfig& config);

}  // namespace moraine::models
