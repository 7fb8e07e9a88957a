#pragma once

#include <cstdint>
#include <string>

#include "core/json.h"
#include "models/shape.h"

namespace moraine::models {

/// Architecture of a vision transformer, as in a Hugging Face config.json of model type "vit".
struct VitConfig {
  int64_t image_size = 224, patch_size = 16, num_channels = 3;
  int64_t hidden_size = 768, intermediate_size = 3072, num_layers = 12, num_heads = 12;
  std::string hidden_act = "gelu";  // gelu (exact) | gelu_new, gelu_pytorch_tanh (both: tanh approximation)
  bool qkv_bias = true;
  double layer_norm_eps = 1e-12, initializer_range = 0.02;
  int64_t num_labels = 0;  // rows of the classifier; 0 = a backbone without one

  /// Hugging Face's config.json. Throws one UserError naming `origin` and every key that is of the wrong type, out of
  /// range or not implemented. num_labels becomes 0: the weights say whether there is a classifier.
  static VitConfig from_json(const core::Json& json, const std::string& origin);
  /// timm's config.json ("architecture": "vit_..."), which names no shapes: they are taken from its weights, the number
  /// of heads from the architecture's name (tiny 3, small 6, base 12, large and huge 16) or model_args.num_heads.
  /// Throws UserError.
  static VitConfig from_timm(const core::Json& json, const NamedShapes& shapes, const std::string& origin);
  /// A config.json that transformers reads.
  core::Json to_json() const;

  int64_t num_patches() const { return (image_size / patch_size) * (image_size / patch_size); }
  /// Parameters without the classifier.
  int64_t backbone_parameters() const;
};

/// Names and shapes of a ViTModel without pooler (plus "classifier" when num_labels > 0), sorted by name.
NamedShapes expected_tensors(const VitConfig& config);

}  // namespace moraine::models
