#include "models/vit.h"

#include <utility>

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/silu.h>

#include "core/error.h"

namespace moraine::models {
namespace {

// Slots of one layer, in this order.
enum LayerSlot : size_t { kQuery, kKey, kValue, kOutput, kUp, kDown, kBlock };

std::string block_path(int64_t layer) { return fmt::format("encoder.layer.{}", layer); }

// x + LayerScale(branch).
at::Tensor add_branch(const at::Tensor& x, const at::Tensor& branch, const at::Tensor& scale) {
  return scale.defined() ? x + branch * as_type_of(scale, branch) : x + branch;
}

}  // namespace

Vit::Vit(VitConfig config, Weights weights) : Backbone(std::move(weights)), config_(std::move(config)) {
  const int64_t d = config_.hidden_size, h = config_.intermediate_size;
  const VitBlockNames names = block_names(config_);
  for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
    const std::string path = block_path(layer);
    blocks_.emplace_back().first_slot = slots().size();
    for (const char* part : {"query", "key", "value"})
      add_slot({fmt::format("{}.attention.attention.{}", path, part), SlotKind::kLinear, d, d});
    add_slot({path + ".attention.output.dense", SlotKind::kLinear, d, d});
    add_slot({fmt::format("{}.{}", path, names.up), SlotKind::kLinear, d, config_.swiglu ? 2 * h : h});
    add_slot({fmt::format("{}.{}", path, names.down), SlotKind::kLinear, h, d});
    add_slot({path, SlotKind::kBlock, d, d});
  }
  if (config_.num_labels > 0)
    add_slot({"classifier", SlotKind::kLinear, config_.classifier_width(), config_.num_labels});
  refer_to_weights();
}

void Vit::refer_to_weights() {
  const VitBlockNames names = block_names(config_);
  for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
    const std::string path = block_path(layer);
    Block& block = blocks_[static_cast<size_t>(layer)];
    block.before_weight = weight(fmt::format("{}.{}.weight", path, names.norm_before));
    block.before_bias = weight(fmt::format("{}.{}.bias", path, names.norm_before));
    block.after_weight = weight(fmt::format("{}.{}.weight", path, names.norm_after));
    block.after_bias = weight(fmt::format("{}.{}.bias", path, names.norm_after));
    block.attention_scale = weight(path + ".layer_scale1.lambda1");
    block.mlp_scale = weight(path + ".layer_scale2.lambda1");
  }
  for (size_t slot = 0; slot < slots().size(); ++slot) {
    slot_base(slot).weight = weight(slots()[slot].path + ".weight");
    slot_base(slot).bias = weight(slots()[slot].path + ".bias");
  }
  cls_ = weight("embeddings.cls_token");
  positions_ = weight("embeddings.position_embeddings");
  patch_weight_ = weight("embeddings.patch_embeddings.projection.weight");
  patch_bias_ = weight("embeddings.patch_embeddings.projection.bias");
  norm_weight_ = weight("layernorm.weight");
  norm_bias_ = weight("layernorm.bias");
}

at::Tensor Vit::norm(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& bias) const {
  return at::layer_norm(x, {config_.hidden_size}, as_type_of(scale, x), as_type_of(bias, x), config_.layer_norm_eps);
}

at::Tensor Vit::attention(const Block& block, const at::Tensor& x) const {
  const int64_t batch = x.size(0), length = x.size(1), heads = config_.num_heads;
  const auto split = [&](size_t slot) {
    return apply(block.first_slot + slot, x).view({batch, length, heads, config_.hidden_size / heads}).transpose(1, 2);
  };
  const at::Tensor y = at::scaled_dot_product_attention(split(kQuery), split(kKey), split(kValue));
  return apply(block.first_slot + kOutput, y.transpose(1, 2).reshape({batch, length, config_.hidden_size}));
}

at::Tensor Vit::mlp(const Block& block, const at::Tensor& x) const {
  const at::Tensor inner = apply(block.first_slot + kUp, x);
  if (config_.swiglu) {
    const auto halves = inner.chunk(2, -1);
    return apply(block.first_slot + kDown, at::silu(halves[0]) * halves[1]);
  }
  return apply(block.first_slot + kDown, at::gelu(inner, config_.hidden_act == "gelu" ? "none" : "tanh"));
}

at::Tensor Vit::layer(const Block& block, at::Tensor x) const {
  x = add_branch(x, attention(block, norm(x, block.before_weight, block.before_bias)), block.attention_scale);
  x = add_branch(x, mlp(block, norm(x, block.after_weight, block.after_bias)), block.mlp_scale);
  return taken(block.first_slot + kBlock) ? apply(block.first_slot + kBlock, x) : x;
}

at::Tensor Vit::trunk(const at::Tensor& images) {
  const int64_t channels = config_.num_channels, size = config_.image_size, patch = config_.patch_size,
                side = size / patch;
  MORAINE_CHECK(images.dim() == 4, "images must be [B, C, H, W]");
  if (images.size(1) != channels || images.size(2) != size || images.size(3) != size)
    throw core::UserError(fmt::format("models: the vision transformer takes images of {} x {} x {}, got {} x {} x {}",
                                      channels, size, size, images.size(1), images.size(2), images.size(3)),
                          "bring the images to the model's size first");
  const int64_t batch = images.size(0), d = config_.hidden_size;
  // A convolution whose stride is its kernel is one matrix product over flattened patches.
  const at::Tensor patches = images.to(dtype())
                                 .reshape({batch, channels, side, patch, side, patch})
                                 .permute({0, 2, 4, 1, 3, 5})
                                 .reshape({batch, side * side, channels * patch * patch});
  const at::Tensor embedded = apply_linear(patches, patch_weight_.reshape({d, -1}), patch_bias_);
  at::Tensor x =
      at::cat({as_type_of(cls_, embedded).expand({batch, 1, d}), embedded}, 1) + as_type_of(positions_, embedded);
  for (const Block& block : blocks_)
    x = through(x, [this, &block](const at::Tensor& input) { return layer(block, input); });
  return x;
}

at::Tensor Vit::features(const at::Tensor& images) {
  return norm(trunk(images).select(1, 0), norm_weight_, norm_bias_);
}

at::Tensor Vit::hidden_states(const at::Tensor& images) { return norm(trunk(images), norm_weight_, norm_bias_); }

at::Tensor Vit::logits(const at::Tensor& images) {
  MORAINE_CHECK(config_.num_labels > 0, "this vision transformer has no classifier");
  if (config_.family == VitFamily::kVit) return apply(slots().size() - 1, features(images));
  const at::Tensor tokens = hidden_states(images);
  return apply(slots().size() - 1, at::cat({tokens.select(1, 0), tokens.slice(1, 1).mean(1)}, 1));
}

}  // namespace moraine::models
