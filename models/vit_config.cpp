#include "models/vit_config.h"

#include <algorithm>
#include <array>
#include <map>
#include <vector>

#include <fmt/ranges.h>

#include "core/error.h"
#include "models/config_keys.h"

namespace moraine::models {
namespace {

using core::Json;

constexpr std::array kActivations = {"gelu", "gelu_new", "gelu_pytorch_tanh"};

constexpr std::array kRead = {"model_type",     "image_size",        "patch_size",         "num_channels",
                              "hidden_size",    "hidden_act",        "num_hidden_layers",  "qkv_bias",
                              "layer_norm_eps", "initializer_range", "num_attention_heads"};
// Dropout is off in evaluation; the others belong to a pooler or to masked images.
const std::vector<std::string> kIrrelevant = {"attention_probs_dropout_prob", "hidden_dropout_prob", "encoder_stride",
                                              "pooler_act", "pooler_output_size"};
// Dropped paths are a matter of training; the others belong to masked images or say what a detector takes out.
const std::vector<std::string> kDinov2Irrelevant = {
    "attention_probs_dropout_prob", "hidden_dropout_prob", "drop_path_rate", "use_mask_token", "apply_layernorm",
    "reshape_hidden_states",        "out_features",        "out_indices",    "stage_names"};

// timm: notes, and what the shapes of the weights say again.
const std::vector<std::string> kTimmIrrelevant = {
    "architecture", "num_classes",        "num_features", "global_pool",  "model_args", "pretrained_cfg",
    "label_names",  "label_descriptions", "pretrained",   "timm_version", "classifier", "license"};
const std::vector<std::string> kTimmArguments = {
    "attn_drop_rate",  "class_token", "depth",         "drop_path_rate", "drop_rate",      "embed_dim",   "fix_init",
    "global_pool",     "img_size",    "in_chans",      "mlp_ratio",      "no_embed_class", "num_classes", "num_heads",
    "patch_drop_rate", "patch_size",  "pos_drop_rate", "proj_drop_rate", "qkv_bias",       "weight_init"};

[[noreturn]] void refuse(const std::string& origin, const std::vector<std::string>& problems) {
  throw core::UserError(
      fmt::format("models: {}: not a vision transformer that can be built:\n  {}", origin, fmt::join(problems, "\n  ")),
      "supported: Hugging Face model types vit and dinov2, timm's plain vit_* models");
}

std::vector<std::string> problems_of(const VitConfig& c) {
  std::vector<std::string> problems;
  const std::pair<const char*, int64_t> sizes[] = {{"image_size", c.image_size},
                                                   {"patch_size", c.patch_size},
                                                   {"num_channels", c.num_channels},
                                                   {"hidden_size", c.hidden_size},
                                                   {"intermediate_size", c.intermediate_size},
                                                   {"num_hidden_layers", c.num_layers},
                                                   {"num_attention_heads", c.num_heads}};
  for (const auto& [key, value] : sizes)
    if (value < 1) problems.push_back(fmt::format("'{}' must be positive: {}", key, value));
  if (!problems.empty()) return problems;
  const auto real = [](int64_t size) { return static_cast<double>(size); };
  const double layer = real(c.hidden_size) * (4 * real(c.hidden_size) + 2 * real(c.intermediate_size));
  if (const auto implausible = implausible_sizes(
          c.num_layers, {c.image_size, c.patch_size, c.num_channels, c.hidden_size, c.intermediate_size, c.num_heads},
          real(c.num_layers) * layer +
              real(c.hidden_size) * real(c.num_channels) *
                  (real(c.patch_size) * real(c.patch_size) + real(c.image_size) * real(c.image_size))))
    return {*implausible};
  if (c.image_size % c.patch_size)
    problems.push_back(fmt::format("'image_size' {} is no multiple of 'patch_size' {}", c.image_size, c.patch_size));
  if (c.hidden_size % c.num_heads)
    problems.push_back(
        fmt::format("'hidden_size' {} is no multiple of 'num_attention_heads' {}", c.hidden_size, c.num_heads));
  if (std::find(kActivations.begin(), kActivations.end(), c.hidden_act) == kActivations.end())
    problems.push_back(
        fmt::format("'hidden_act' = \"{}\" is not implemented (only {})", c.hidden_act, fmt::join(kActivations, ", ")));
  if (!(c.layer_norm_eps > 0))
    problems.push_back(fmt::format("'layer_norm_eps' must be positive: {}", c.layer_norm_eps));
  return problems;
}

// Reads `key` into `value`; an absent or null key keeps what is there, which is transformers' default.
template <typename T>
void read(const Json& json, const char* key, T& value, std::vector<std::string>& problems) {
  const auto at = json.find(key);
  if (at == json.end() || at->is_null()) return;
  bool good;
  if constexpr (std::is_same_v<T, int64_t>)
    good = at->is_number_integer();
  else if constexpr (std::is_same_v<T, bool>)
    good = at->is_boolean();
  else if constexpr (std::is_same_v<T, double>)
    good = at->is_number();
  else
    good = at->is_string();
  if (good)
    value = at->template get<T>();
  else
    problems.push_back(fmt::format("'{}' has the wrong type: {}", key, at->dump()));
}

// The inner width follows as transformers' Dinov2MLP and Dinov2SwiGLUFFN compute it.
void read_dinov2(ConfigKeys& keys, VitConfig& c) {
  c.mlp_ratio = keys.number("mlp_ratio", c.mlp_ratio);
  c.swiglu = keys.boolean("use_swiglu_ffn", c.swiglu);
  c.layerscale_value = keys.number("layerscale_value", c.layerscale_value);
  const double inner = static_cast<double>(c.hidden_size) * c.mlp_ratio;
  if (!(inner >= 1 && inner < 9e15)) {
    keys.wrong(fmt::format("'mlp_ratio' gives no inner width: {}", c.mlp_ratio));
    return;
  }
  c.intermediate_size = static_cast<int64_t>(inner);
  if (c.swiglu)
    c.intermediate_size = (static_cast<int64_t>(static_cast<double>(c.intermediate_size) * 2 / 3) + 7) / 8 * 8;
}

}  // namespace

VitConfig VitConfig::from_json(const Json& json, const std::string& origin) {
  VitConfig c;
  std::vector<std::string> problems;
  const Json type = json.is_object() ? json.value("model_type", Json()) : Json();
  if (type != "vit" && type != "dinov2") refuse(origin, {"'model_type' must be \"vit\" or \"dinov2\""});
  if (type == "dinov2") c.family = VitFamily::kDinov2, c.patch_size = 14, c.layer_norm_eps = 1e-6;
  read(json, "image_size", c.image_size, problems);
  read(json, "patch_size", c.patch_size, problems);
  read(json, "num_channels", c.num_channels, problems);
  read(json, "hidden_size", c.hidden_size, problems);
  read(json, "num_hidden_layers", c.num_layers, problems);
  read(json, "num_attention_heads", c.num_heads, problems);
  read(json, "hidden_act", c.hidden_act, problems);
  read(json, "qkv_bias", c.qkv_bias, problems);
  read(json, "layer_norm_eps", c.layer_norm_eps, problems);
  read(json, "initializer_range", c.initializer_range, problems);
  ConfigKeys keys(json, problems);
  for (const char* key : kRead) keys.find(key);
  if (c.family == VitFamily::kVit)
    c.intermediate_size = keys.integer("intermediate_size", c.intermediate_size);
  else
    read_dinov2(keys, c);
  keys.refuse_unread(c.family == VitFamily::kVit ? kIrrelevant : kDinov2Irrelevant);
  if (problems.empty()) problems = problems_of(c);
  if (!problems.empty()) refuse(origin, problems);
  return c;
}

VitConfig VitConfig::from_timm(const Json& json, const NamedShapes& shapes, const std::string& origin) {
  const std::string architecture = json.value("architecture", std::string());
  if (!architecture.starts_with("vit_"))
    refuse(origin, {fmt::format("timm's 'architecture' = \"{}\" is not a plain vit_*", architecture)});
  std::vector<std::string> problems;
  ConfigKeys keys(json, problems);
  keys.only("global_pool", "token");
  if (architecture.find("quickgelu") != std::string::npos)
    problems.push_back(fmt::format("timm's 'architecture' = \"{}\": its activation is not implemented", architecture));
  keys.refuse_unread(kTimmIrrelevant);
  if (const auto arguments = json.find("model_args"); arguments != json.end() && arguments->is_object()) {
    ConfigKeys inner(*arguments, problems);
    inner.only("global_pool", "token");
    inner.only("class_token", true);
    inner.refuse_unread(kTimmArguments);
    if (const auto heads = arguments->find("num_heads"); heads != arguments->end() && !heads->is_number_integer())
      problems.push_back(fmt::format("'num_heads' must be an integer: {}", heads->dump()));
  }
  if (!problems.empty()) refuse(origin, problems);
  const std::map<std::string, Shape> found(shapes.begin(), shapes.end());
  const auto shape = [&](const std::string& name, size_t dimensions) {
    const auto at = found.find(name);
    if (at == found.end() || at->second.size() != dimensions)
      refuse(origin, {fmt::format("the weights have no '{}' of {} dimensions", name, dimensions)});
    return at->second;
  };
  VitConfig c;
  const Shape patches = shape("patch_embed.proj.weight", 4), positions = shape("pos_embed", 3);
  c.hidden_size = patches[0], c.num_channels = patches[1], c.patch_size = patches[2];
  c.intermediate_size = shape("blocks.0.mlp.fc1.weight", 2)[0];
  c.qkv_bias = found.count("blocks.0.attn.qkv.bias") > 0;
  c.layer_norm_eps = 1e-6;
  for (c.num_layers = 0; found.count(fmt::format("blocks.{}.norm1.weight", c.num_layers));) ++c.num_layers;
  int64_t side = 0;
  while ((side + 1) * (side + 1) <= positions[1] - 1) ++side;
  if (side * side != positions[1] - 1)
    refuse(origin, {fmt::format("'pos_embed' has {} places, not a square and one more", positions[1])});
  c.image_size = side * c.patch_size;
  c.num_heads = 0;
  for (const auto& [size, heads] : {std::pair{"tiny", 3}, {"small", 6}, {"base", 12}, {"large", 16}, {"huge", 16}})
    if (architecture.starts_with(fmt::format("vit_{}_", size))) c.num_heads = heads;
  if (const auto arguments = json.find("model_args"); arguments != json.end() && arguments->is_object())
    c.num_heads = arguments->value("num_heads", c.num_heads);
  if (c.num_heads == 0)
    refuse(origin, {fmt::format("'{}' does not say its number of heads; add \"model_args\": {{\"num_heads\": N}}",
                                architecture)});
  problems = problems_of(c);
  if (!problems.empty()) refuse(origin, problems);
  return c;
}

Json VitConfig::to_json() const {
  const bool dinov2 = family == VitFamily::kDinov2;
  Json json = {{"architectures",
                {std::string(dinov2 ? "Dinov2" : "ViT") + (num_labels > 0 ? "ForImageClassification" : "Model")}},
               {"model_type", dinov2 ? "dinov2" : "vit"},
               {"image_size", image_size},
               {"patch_size", patch_size},
               {"num_channels", num_channels},
               {"hidden_size", hidden_size},
               {"num_hidden_layers", num_layers},
               {"num_attention_heads", num_heads},
               {"hidden_act", hidden_act},
               {"qkv_bias", qkv_bias},
               {"layer_norm_eps", layer_norm_eps},
               {"initializer_range", initializer_range},
               {"hidden_dropout_prob", 0.0},
               {"attention_probs_dropout_prob", 0.0}};
  if (dinov2)
    json.update({{"mlp_ratio", mlp_ratio},
                 {"use_swiglu_ffn", swiglu},
                 {"layerscale_value", layerscale_value},
                 {"use_mask_token", false}});
  else
    json["intermediate_size"] = intermediate_size;
  for (int64_t label = 0; label < num_labels; ++label) {
    json["id2label"][std::to_string(label)] = fmt::format("LABEL_{}", label);
    json["label2id"][fmt::format("LABEL_{}", label)] = label;
  }
  return json;
}

int64_t VitConfig::backbone_parameters() const {
  VitConfig backbone = *this;
  backbone.num_labels = 0;
  int64_t total = 0;
  for (const auto& [name, shape] : expected_tensors(backbone)) {
    int64_t size = 1;
    for (const int64_t n : shape) size *= n;
    total += size;
  }
  return total;
}

VitBlockNames block_names(const VitConfig& config) {
  if (config.family == VitFamily::kVit)
    return {"layernorm_before", "layernorm_after", "intermediate.dense", "output.dense"};
  if (config.swiglu) return {"norm1", "norm2", "mlp.weights_in", "mlp.weights_out"};
  return {"norm1", "norm2", "mlp.fc1", "mlp.fc2"};
}

NamedShapes expected_tensors(const VitConfig& c) {
  const int64_t d = c.hidden_size, h = c.intermediate_size;
  const VitBlockNames names = block_names(c);
  NamedShapes list = {
      {"embeddings.cls_token", {1, 1, d}},
      {"embeddings.position_embeddings", {1, c.num_patches() + 1, d}},
      {"embeddings.patch_embeddings.projection.weight", {d, c.num_channels, c.patch_size, c.patch_size}},
      {"embeddings.patch_embeddings.projection.bias", {d}}};
  const auto linear = [&](const std::string& path, int64_t out, int64_t in, bool bias) {
    list.emplace_back(path + ".weight", Shape{out, in});
    if (bias) list.emplace_back(path + ".bias", Shape{out});
  };
  const auto norm = [&](const std::string& path) {
    list.emplace_back(path + ".weight", Shape{d});
    list.emplace_back(path + ".bias", Shape{d});
  };
  for (int64_t layer = 0; layer < c.num_layers; ++layer) {
    const std::string path = fmt::format("encoder.layer.{}", layer);
    for (const char* part : {"query", "key", "value"})
      linear(fmt::format("{}.attention.attention.{}", path, part), d, d, c.qkv_bias);
    linear(path + ".attention.output.dense", d, d, true);
    linear(fmt::format("{}.{}", path, names.up), c.swiglu ? 2 * h : h, d, true);
    linear(fmt::format("{}.{}", path, names.down), d, h, true);
    norm(fmt::format("{}.{}", path, names.norm_before));
    norm(fmt::format("{}.{}", path, names.norm_after));
    if (c.family == VitFamily::kDinov2)
      for (const char* branch : {"layer_scale1", "layer_scale2"})
        list.emplace_back(fmt::format("{}.{}.lambda1", path, branch), Shape{d});
  }
  norm("layernorm");
  if (c.num_labels > 0) linear("classifier", c.num_labels, c.classifier_width(), true);
  std::sort(list.begin(), list.end());
  return list;
}

}  // namespace moraine::models
