// Vision transformers out of files: transformers' key layouts, and timm's brought to one; models for another image
// size.
#include <algorithm>
#include <utility>

#include <ATen/ops/cat.h>
#include <ATen/ops/upsample_bicubic2d.h>
#include <fmt/ranges.h>

#include "core/error.h"
#include "core/json.h"
#include "models/vit.h"

namespace moraine::models {
namespace {

using core::TensorView;

// Classifiers prefix their backbone with "vit." or "dinov2."; no method uses a pooler or the token of masked patches.
std::vector<TensorView> from_hugging_face(const std::vector<TensorView>& tensors) {
  std::vector<TensorView> out;
  for (TensorView view : tensors) {
    for (const std::string prefix : {"vit.", "dinov2."})
      if (view.name.starts_with(prefix)) view.name = view.name.substr(prefix.size());
    if (!view.name.starts_with("pooler.") && view.name != "embeddings.mask_token") out.push_back(std::move(view));
  }
  return out;
}

// timm's names, and its fused qkv matrices cut into three views of the same bytes. A name that is none of a plain ViT's
// stays as it is and is reported as left over.
std::vector<TensorView> from_timm(const std::vector<TensorView>& tensors) {
  constexpr std::pair<const char*, const char*> kNames[] = {
      {"cls_token", "embeddings.cls_token"},
      {"pos_embed", "embeddings.position_embeddings"},
      {"patch_embed.proj.", "embeddings.patch_embeddings.projection."},
      {"norm.", "layernorm."},
      {"head.", "classifier."}};
  constexpr std::pair<const char*, const char*> kBlockNames[] = {{"norm1.", "layernorm_before."},
                                                                 {"norm2.", "layernorm_after."},
                                                                 {"attn.proj.", "attention.output.dense."},
                                                                 {"mlp.fc1.", "intermediate.dense."},
                                                                 {"mlp.fc2.", "output.dense."}};
  const auto renamed = [](const std::string& name, const auto& table) {
    for (const auto& [from, to] : table)
      if (name.starts_with(from)) return to + name.substr(std::string(from).size());
    return name;
  };
  std::vector<TensorView> out;
  for (TensorView view : tensors) {
    const size_t dot = view.name.starts_with("blocks.") ? view.name.find('.', 7) : std::string::npos;
    if (dot == std::string::npos) {
      view.name = renamed(view.name, kNames);
      out.push_back(std::move(view));
      continue;
    }
    const std::string block = "encoder.layer." + view.name.substr(7, dot - 7) + ".", name = view.name.substr(dot + 1);
    if (name.starts_with("attn.qkv.") && !view.shape.empty() && view.shape[0] % 3 == 0) {
      const size_t bytes = view.data.size() / 3;
      Shape shape = view.shape;
      shape[0] /= 3;
      const std::string suffix = name.substr(9);
      size_t part = 0;
      for (const char* target : {"query", "key", "value"})
        out.push_back({fmt::format("{}attention.attention.{}.{}", block, target, suffix), view.dtype, shape,
                       view.data.subspan(bytes * part++, bytes)});
      continue;
    }
    view.name = block + renamed(name, kBlockNames);
    out.push_back(std::move(view));
  }
  return out;
}

}  // namespace

Vit Vit::from_config(const VitConfig& config, uint64_t seed, at::ScalarType dtype) {
  Weights weights = random_weights(expected_tensors(config), seed, config.initializer_range, dtype);
  for (auto& [name, weight] : weights.tensors)
    if (name.ends_with(".lambda1")) weight.fill_(config.layerscale_value);
  return Vit(config, std::move(weights));
}

Vit Vit::from_tensors(const core::Json& config, const std::vector<core::TensorView>& tensors, const std::string& origin,
                      std::optional<at::ScalarType> dtype, const std::shared_ptr<const void>& owner) {
  const bool timm = config.is_object() && config.contains("architecture") && !config.contains("model_type");
  NamedShapes shapes;
  for (const auto& view : tensors) shapes.emplace_back(view.name, view.shape);
  VitConfig parsed = timm ? VitConfig::from_timm(config, shapes, origin) : VitConfig::from_json(config, origin);
  const std::vector<TensorView> named = timm ? from_timm(tensors) : from_hugging_face(tensors);
  for (const auto& view : named)
    if (view.name == "classifier.weight" && !view.shape.empty()) parsed.num_labels = view.shape[0];
  require_plausible_layers(parsed.num_layers, 1, named.size(), origin);
  return Vit(parsed, match_weights(expected_tensors(parsed), named, origin, dtype, owner));
}

Vit Vit::from_directory(const std::filesystem::path& directory, std::optional<at::ScalarType> dtype,
                        std::optional<int64_t> image_size) {
  const core::Json config = core::read_json(directory / "config.json");
  const auto files = std::make_shared<const core::ShardedSafetensors>(core::ShardedSafetensors::open(directory));
  Vit model = from_tensors(config, files->tensors(), directory.string(), dtype, files);
  return image_size ? model.resized(*image_size) : std::move(model);
}

Vit Vit::on(at::Device device) const { return Vit(config_, frozen_weights(device)); }

std::unique_ptr<Backbone> Vit::with_weights(Weights weights) const {
  return std::unique_ptr<Backbone>(new Vit(config_, std::move(weights)));
}

Vit Vit::backbone() const {
  VitConfig config = config_;
  config.num_labels = 0;
  Weights weights = frozen_weights(device());
  std::erase_if(weights.tensors, [](const auto& entry) { return entry.first.starts_with("classifier."); });
  return Vit(config, std::move(weights));
}

Vit Vit::resized(int64_t image_size) const {
  if (image_size < 1 || image_size % config_.patch_size != 0)
    throw core::UserError(fmt::format("models: image size {} is no positive multiple of the vision transformer's "
                                      "patch size {}",
                                      image_size, config_.patch_size),
                          fmt::format("choose a multiple of {}", config_.patch_size));
  VitConfig config = config_;
  config.image_size = image_size;
  Weights weights = frozen_weights(device());
  if (image_size == config_.image_size) return Vit(std::move(config), std::move(weights));
  at::Tensor& positions = weights.tensors.at("embeddings.position_embeddings");
  const int64_t d = config_.hidden_size, from = config_.image_size / config_.patch_size,
                to = image_size / config_.patch_size;
  const at::Tensor grid = positions.slice(1, 1).reshape({1, from, from, d}).permute({0, 3, 1, 2}).to(at::kFloat);
  const at::Tensor scaled = at::upsample_bicubic2d(grid, {to, to}, /*align_corners=*/false);
  positions = at::cat(
      {positions.slice(1, 0, 1), scaled.permute({0, 2, 3, 1}).reshape({1, to * to, d}).to(positions.scalar_type())}, 1);
  return Vit(std::move(config), std::move(weights));
}

}  // namespace moraine::models
