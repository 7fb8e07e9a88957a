#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "core/safetensors.h"
#include "models/backbone.h"
#include "models/vit_config.h"

namespace moraine::models {

/// A vision transformer: patches and a CLS token, learned positions, pre-norm blocks, a last norm.
///
/// Slots: "encoder.layer.N.attention.attention.{query,key,value}", ".attention.output.dense", ".intermediate.dense" and
/// ".output.dense" (dinov2: ".mlp.fc1" and ".mlp.fc2", with SwiGLU ".mlp.weights_in" and ".mlp.weights_out") of every
/// layer, and "classifier" when there is one. Weights have the names of transformers' ViTModel or Dinov2Model. Threads
/// and frozen weights as Backbone. Source: transformers 4.57 (vit, dinov2); ViT (arXiv 2010.11929), DINOv2
/// (2304.07193).
class Vit : public Backbone {
 public:
  /// Random weights: normal(0, initializer_range), norms 1, biases 0; each tensor from `seed` and its name alone.
  static Vit from_config(const VitConfig& config, uint64_t seed, at::ScalarType dtype);
  /// config.json + safetensors of transformers (ViT, DINOv2; with or without ForImageClassification) or timm (plain
  /// vit_*). A pooler and a mask token are left out: no method uses them. Other keys and shapes are checked as
  /// match_weights() does; `dtype` as there. With an `image_size` the model takes images of that size: see resized().
  static Vit from_directory(const std::filesystem::path& directory, std::optional<at::ScalarType> dtype,
                            std::optional<int64_t> image_size = std::nullopt);
  /// From named tensors that somebody else loaded, in either layout; `config` is the parsed config.json of that layout.
  static Vit from_tensors(const core::Json& config, const std::vector<core::TensorView>& tensors,
                          const std::string& origin, std::optional<at::ScalarType> dtype,
                          const std::shared_ptr<const void>& owner = nullptr);
  /// Shares this model's weights, frozen; slots start empty.
  Vit share() const { return on(device()); }
  Vit on(at::Device device) const;
  /// The same without its classifier.
  Vit backbone() const;
  /// The same for images of another size: positions are interpolated once, bicubically in float32 over the grid of
  /// patches, as transformers does in every pass; the CLS token's stays. Throws UserError if `image_size` is no
  /// positive multiple of the patch size.
  Vit resized(int64_t image_size) const;

  Vit(Vit&&) = default;
  Vit& operator=(Vit&&) = default;

  /// images [B, C, H, W] of the model's size and dtype -> the CLS token after the last norm, [B, d].
  /// Throws UserError on another number of channels or another size.
  at::Tensor features(const at::Tensor& images);
  /// All tokens after the last norm, CLS first, [B, 1 + patches, d].
  at::Tensor hidden_states(const at::Tensor& images);
  /// The classifier on the CLS token (dinov2: and on the mean of the patches' tokens), [B, num_labels]. Throws
  /// InternalError without a classifier.
  at::Tensor logits(const at::Tensor& images);

  at::Tensor features(const Input& input) override { return features(input.images); }
  int64_t width() const override { return config_.hidden_size; }
  core::Json config_json() const override { return config_.to_json(); }

  const VitConfig& config() const { return config_; }

 private:
  struct Block {
    at::Tensor before_weight, before_bias, after_weight, after_bias;
    at::Tensor attention_scale, mlp_scale;  // [d]: LayerScale; undefined without
    size_t first_slot = 0;
  };
  Vit(VitConfig config, Weights weights);
  void refer_to_weights() override;
  std::unique_ptr<Backbone> with_weights(Weights weights) const override;
  at::Tensor norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) const;
  at::Tensor attention(const Block& block, const at::Tensor& x) const;
  at::Tensor mlp(const Block& block, const at::Tensor& x) const;
  at::Tensor layer(const Block& block, at::Tensor x) const;
  at::Tensor trunk(const at::Tensor& images);

  VitConfig config_;
  std::vector<Block> blocks_;
  at::Tensor cls_, positions_, patch_weight_, patch_bias_, norm_weight_, norm_bias_;
};

}  // namespace moraine::models
