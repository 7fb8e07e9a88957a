#include "models/bert.h"

#include <algorithm>
#include <utility>

#include <ATen/TensorOperators.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scaled_dot_product_attention.h>

#include "core/error.h"
#include "core/json.h"

namespace moraine::models {
namespace {

// Slots of one layer, in this order.
enum LayerSlot : size_t { kQuery, kKey, kValue, kOutput, kUp, kDown, kBlock };

// Names as in BertModel, behind no prefix. Models for pre-training have "bert." and heads of their own ("cls."), which
// nothing here uses; old ones call a norm's tensors gamma and beta and keep buffers: 0, 1, 2, ... and 0, 0, 0, ...
std::vector<core::TensorView> encoder_tensors(const std::vector<core::TensorView>& tensors) {
  constexpr std::pair<const char*, const char*> kOldNames[] = {{"LayerNorm.gamma", "LayerNorm.weight"},
                                                               {"LayerNorm.beta", "LayerNorm.bias"}};
  std::vector<core::TensorView> out;
  for (core::TensorView view : tensors) {
    if (view.name.ends_with("embeddings.position_ids") || view.name.ends_with("embeddings.token_type_ids")) continue;
    if (view.name.starts_with("cls.")) continue;
    if (view.name.starts_with("bert.")) view.name = view.name.substr(5);
    for (const auto& [old_name, name] : kOldNames)
      if (view.name.ends_with(old_name)) view.name.replace(view.name.rfind(old_name), std::string::npos, name);
    out.push_back(std::move(view));
  }
  return out;
}

}  // namespace

Bert::Bert(BertConfig config, Weights weights) : Backbone(std::move(weights)), config_(std::move(config)) {
  const int64_t d = config_.hidden_size, h = config_.intermediate_size;
  for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
    const std::string path = fmt::format("{}encoder.layer.{}", config_.prefix(), layer);
    blocks_.emplace_back().first_slot = slots().size();
    for (const char* part : {"query", "key", "value"})
      add_slot({path + ".attention.self." + part, SlotKind::kLinear, d, d});
    add_slot({path + ".attention.output.dense", SlotKind::kLinear, d, d});
    add_slot({path + ".intermediate.dense", SlotKind::kLinear, d, h});
    add_slot({path + ".output.dense", SlotKind::kLinear, h, d});
    add_slot({path, SlotKind::kBlock, d, d});
  }
  if (config_.pooler) add_slot({config_.prefix() + "pooler.dense", SlotKind::kLinear, d, d});
  if (config_.num_labels > 0) add_slot({"classifier", SlotKind::kLinear, d, config_.num_labels});
  refer_to_weights();
}

Bert Bert::from_config(const BertConfig& config, uint64_t seed, at::ScalarType dtype) {
  return Bert(config, random_weights(expected_tensors(config), seed, config.initializer_range, dtype));
}

Bert Bert::from_directory(const std::filesystem::path& directory, std::optional<at::ScalarType> dtype) {
  const std::filesystem::path config_path = directory / "config.json";
  const BertConfig config = BertConfig::from_json(core::read_json(config_path), config_path.string());
  const auto files = std::make_shared<const core::ShardedSafetensors>(core::ShardedSafetensors::open(directory));
  return from_tensors(config, files->tensors(), directory.string(), dtype, files);
}

Bert Bert::from_tensors(BertConfig config, const std::vector<core::TensorView>& tensors, const std::string& origin,
                        std::optional<at::ScalarType> dtype, const std::shared_ptr<const void>& owner) {
  std::vector<core::TensorView> weights = encoder_tensors(tensors);
  config.pooler = false, config.num_labels = 0;
  for (const core::TensorView& view : weights) {
    config.pooler = config.pooler || view.name.starts_with("pooler.dense.");
    if (view.name == "classifier.weight" && !view.shape.empty()) config.num_labels = view.shape[0];
  }
  config.pooler = config.pooler || config.num_labels > 0;
  for (core::TensorView& view : weights)
    if (!view.name.starts_with("classifier.")) view.name = config.prefix() + view.name;
  require_plausible_layers(config.num_layers, 1, weights.size(), origin);
  return Bert(config, match_weights(expected_tensors(config), weights, origin, dtype, owner));
}

Bert Bert::on(at::Device device) const { return Bert(config_, frozen_weights(device)); }

std::unique_ptr<Backbone> Bert::with_weights(Weights weights) const {
  return std::unique_ptr<Backbone>(new Bert(config_, std::move(weights)));
}

Bert Bert::without_classifier() const {
  BertConfig config = config_;
  config.num_labels = 0;
  Weights weights{{}, dtype()};
  for (auto& [name, tensor] : frozen_weights(device()).tensors)
    if (!name.starts_with("classifier.")) weights.tensors.emplace(name.substr(config_.prefix().size()), tensor);
  return Bert(config, std::move(weights));
}

Bert::Norm Bert::norm_at(const std::string& path) const {
  return {weight(config_.prefix() + path + ".LayerNorm.weight"), weight(config_.prefix() + path + ".LayerNorm.bias")};
}

void Bert::refer_to_weights() {
  for (size_t layer = 0; layer < blocks_.size(); ++layer) {
    const std::string path = fmt::format("encoder.layer.{}", layer);
    blocks_[layer].attention = norm_at(path + ".attention.output");
    blocks_[layer].output = norm_at(path + ".output");
  }
  for (size_t slot = 0; slot < slots().size(); ++slot) {
    slot_base(slot).weight = weight(slots()[slot].path + ".weight");
    slot_base(slot).bias = weight(slots()[slot].path + ".bias");
  }
  const std::string embeddings = config_.prefix() + "embeddings";
  words_ = weight(embeddings + ".word_embeddings.weight");
  positions_ = weight(embeddings + ".position_embeddings.weight");
  types_ = weight(embeddings + ".token_type_embeddings.weight");
  embedding_norm_ = norm_at("embeddings");
}

at::Tensor Bert::normalise(const at::Tensor& x, const Norm& norm) const {
  return at::layer_norm(x, {config_.hidden_size}, as_type_of(norm.weight, x), as_type_of(norm.bias, x),
                        config_.layer_norm_eps);
}

at::Tensor Bert::attention(const Block& block, const at::Tensor& x, const at::Tensor& mask) const {
  const int64_t batch = x.size(0), length = x.size(1), heads = config_.num_heads;
  const auto split = [&](size_t slot) {
    return apply(block.first_slot + slot, x).view({batch, length, heads, config_.hidden_size / heads}).transpose(1, 2);
  };
  const std::optional<at::Tensor> keys =
      mask.defined() ? std::optional(mask.view({batch, 1, 1, length}).expand({batch, 1, length, length}))
                     : std::nullopt;
  const at::Tensor y = at::scaled_dot_product_attention(split(kQuery), split(kKey), split(kValue), keys);
  return apply(block.first_slot + kOutput, y.transpose(1, 2).reshape({batch, length, config_.hidden_size}));
}

at::Tensor Bert::layer(const Block& block, at::Tensor x, const at::Tensor& mask) const {
  x = normalise(x + attention(block, x, mask), block.attention);
  x = normalise(x + apply(block.first_slot + kDown, at::gelu(apply(block.first_slot + kUp, x))), block.output);
  return taken(block.first_slot + kBlock) ? apply(block.first_slot + kBlock, x) : x;
}

at::Tensor Bert::hidden_states(const at::Tensor& tokens, const at::Tensor& mask) {
  MORAINE_CHECK(tokens.dim() == 2 && tokens.scalar_type() == at::kLong, "tokens must be [B, T] int64");
  MORAINE_CHECK(!mask.defined() || (mask.scalar_type() == at::kBool && mask.sizes() == tokens.sizes()),
                "the mask must be [B, T] bool");
  const int64_t length = tokens.size(1);
  if (length > config_.max_position_embeddings)
    throw core::UserError(fmt::format("models: {} tokens are more than the encoder's {} positions", length,
                                      config_.max_position_embeddings),
                          "cut the text into shorter pieces");
  const int64_t low = tokens.numel() > 0 ? tokens.min().item<int64_t>() : 0,
                high = tokens.numel() > 0 ? tokens.max().item<int64_t>() : 0;
  if (low < 0 || high >= config_.vocab_size)
    throw core::UserError(fmt::format("models: token outside the encoder's vocabulary of {}: {}", config_.vocab_size,
                                      low < 0 ? low : high),
                          "the text was prepared with another tokeniser than the encoder's");
  if (length == 0 || (mask.defined() && !mask.any(1).all().item<bool>()))
    throw core::UserError("models: a text without any token cannot be encoded", "leave empty texts out");
  const at::Tensor embedded =
      at::embedding(words_, tokens).to(dtype()) + types_[0].to(dtype()) + positions_.slice(0, 0, length).to(dtype());
  at::Tensor x = normalise(embedded, embedding_norm_);
  for (const Block& block : blocks_)
    x = through(x, [this, &block, mask](const at::Tensor& input) { return layer(block, input, mask); });
  return x;
}

at::Tensor Bert::pooled(const at::Tensor& tokens, const at::Tensor& mask) {
  MORAINE_CHECK(config_.pooler, "this encoder has no pooler");
  const size_t pooler = slots().size() - (config_.num_labels > 0 ? 2 : 1);
  return apply(pooler, hidden_states(tokens, mask).select(1, 0)).tanh();
}

at::Tensor Bert::logits(const at::Tensor& tokens, const at::Tensor& mask) {
  MORAINE_CHECK(config_.num_labels > 0, "this encoder has no classifier");
  return apply(slots().size() - 1, pooled(tokens, mask));
}

// Over real tokens, [B, d].
at::Tensor Bert::mean_of(const at::Tensor& states, const at::Tensor& mask) const {
  const at::Tensor real = mask.defined() ? mask.unsqueeze(-1).to(states.scalar_type())
                                         : at::ones({states.size(0), states.size(1), 1}, states.options());
  return (states * real).sum(1) / real.sum(1);
}

at::Tensor Bert::features(const Input& input) {
  if (config_.pooler) return pooled(input.tokens, input.mask);
  return mean_of(hidden_states(input.tokens, input.mask), input.mask);
}

at::Tensor Bert::embed(const at::Tensor& tokens, const at::Tensor& mask) {
  const at::Tensor mean = mean_of(hidden_states(tokens, mask), mask);
  return mean / mean.norm(2, {1}, /*keepdim=*/true).clamp_min(1e-12);
}

}  // namespace moraine::models
