#include "models/decoder_config.h"

#include <algorithm>
#include <array>
#include <map>
#include <optional>
#include <set>

#include <fmt/ranges.h>

#include "core/error.h"
#include "core/file.h"
#include "core/registry.h"
#include "models/config_keys.h"

namespace moraine::models {
namespace {

using core::Json;
using Family = DecoderConfig::Family;

// What transformers 4.57 calls a family and assumes where its config.json is silent.
struct FamilyTraits {
  Family family;
  const char* model_type;
  const char* architecture;
  int64_t positions;
  double eps, theta;
  int64_t kv_heads = 0;  // 0 = as many as heads
};
constexpr std::array<FamilyTraits, 6> kFamilies = {{
    {Family::kFlexMore, "flexmore", "FlexMoREForCausalLM", 4096, 1e-6, 500000},
    {Family::kFlexOlmo, "flex_olmo", "FlexOlmoForCausalLM", 4096, 1e-6, 500000},
    {Family::kLlama, "llama", "LlamaForCausalLM", 2048, 1e-6, 10000},
    {Family::kMistral, "mistral", "MistralForCausalLM", 131072, 1e-6, 10000, 8},
    {Family::kOlmo2, "olmo2", "Olmo2ForCausalLM", 2048, 1e-5, 10000},
    {Family::kQwen2, "qwen2", "Qwen2ForCausalLM", 32768, 1e-6, 10000, 32},
}};
constexpr int64_t kWindow = 4096, kQwen2WindowLayers = 28;  // transformers' defaults

const FamilyTraits& traits_of(Family family) {
  return *std::find_if(kFamilies.begin(), kFamilies.end(), [&](const FamilyTraits& t) { return t.family == family; });
}

// Sizes by their key, the ones without a default first.
struct SizeKey {
  const char* key;
  int64_t DecoderConfig::*member;
};
constexpr std::array<SizeKey, 8> kSizes = {{{"vocab_size", &DecoderConfig::vocab_size},
                                            {"hidden_size", &DecoderConfig::hidden_size},
                                            {"intermediate_size", &DecoderConfig::intermediate_size},
                                            {"num_hidden_layers", &DecoderConfig::num_layers},
                                            {"num_attention_heads", &DecoderConfig::num_heads},
                                            {"num_key_value_heads", &DecoderConfig::num_kv_heads},
                                            {"head_dim", &DecoderConfig::head_dim},
                                            {"max_position_embeddings", &DecoderConfig::max_position_embeddings}}};
constexpr size_t kRequiredSizes = 5;

// rope_theta and rope_scaling, or transformers 5's rope_parameters, which holds both.
void read_rope(ConfigKeys& read, DecoderConfig& c, double absent_theta) {
  c.rope_theta = read.number("rope_theta", absent_theta);
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    const Json* rope = read.find(key);
    if (rope == nullptr) continue;
    const Json type =
        rope->is_object() ? rope->value("rope_type", rope->value("type", Json("default"))) : Json(nullptr);
    std::map<std::string, double> numbers;
    if (type == "linear" || type == "llama3") numbers["factor"] = 0;
    if (type == "llama3")
      for (const char* name : {"low_freq_factor", "high_freq_factor", "original_max_position_embeddings"})
        numbers[name] = 0;
    if (type != "default" && numbers.empty()) {
      read.wrong(fmt::format("'{}' = {} is not implemented (only the rotary types default, linear and llama3)", key,
                             rope->dump()));
      continue;
    }
    std::set<std::string> missing;
    for (const auto& [name, value] : numbers) missing.insert(name);
    for (const auto& [name, value] : rope->items()) {
      missing.erase(name);
      if (name == "rope_type" || name == "type") continue;
      const bool known = name == "rope_theta" || numbers.contains(name);
      if (!known || !value.is_number() || value.get<double>() <= 0) {
        read.wrong(fmt::format("'{}': '{}' = {} is not known for the rotary type {}, or no positive number", key, name,
                               value.dump(), type.dump()));
      } else if (name == "rope_theta") {
        c.rope_theta = value.get<double>();
      } else {
        numbers[name] = value.get<double>();
      }
    }
    if (!missing.empty()) read.wrong(fmt::format("'{}' = {} lacks {}", key, rope->dump(), fmt::join(missing, ", ")));
    if (type == "default") continue;
    c.rope_scaling.type = type == "linear" ? RopeScaling::Type::kLinear : RopeScaling::Type::kLlama3;
    c.rope_scaling.factor = numbers["factor"];
    if (type == "linear") continue;
    c.rope_scaling.low_freq_factor = numbers["low_freq_factor"];
    c.rope_scaling.high_freq_factor = numbers["high_freq_factor"];
    c.rope_scaling.original_max_position_embeddings = static_cast<int64_t>(numbers["original_max_position_embeddings"]);
  }
}

// Mistral has a window unless the key says null; Qwen2 has one if `use_sliding_window`, from max_window_layers on.
void read_window(ConfigKeys& read, DecoderConfig& c) {
  const bool none = read.contains("sliding_window") && read.find("sliding_window") == nullptr;
  const int64_t window = none ? 0 : read.integer("sliding_window", kWindow);
  if (!none && window < 1) read.wrong(fmt::format("'sliding_window' must be positive or null: {}", window));
  if (c.family == Family::kMistral) {
    c.sliding_window = window;
    return;
  }
  const int64_t first = read.integer("max_window_layers", kQwen2WindowLayers);
  if (first < 0) read.wrong(fmt::format("'max_window_layers' must not be negative: {}", first));
  if (read.boolean("use_sliding_window", false)) c.sliding_window = window, c.max_window_layers = first;
  const Json* types = read.find("layer_types");
  if (types == nullptr || implausible_sizes(c.num_layers, {}, 0)) return;
  Json expected = Json::array();
  for (int64_t layer = 0; layer < c.num_layers; ++layer)
    expected.push_back(c.window_of(layer) > 0 ? "sliding_attention" : "full_attention");
  if (*types != expected)
    read.wrong(fmt::format("'layer_types' = {} is not implemented (only what max_window_layers says: {})",
                           types->dump(), expected.dump()));
}

Family family_of(const Json& json, const std::string& origin) {
  const std::string type = json.is_object() && json.contains("model_type") && json["model_type"].is_string()
                               ? json["model_type"].get<std::string>()
                               : "";
  std::vector<std::string> known;
  for (const FamilyTraits& names : kFamilies) {
    if (type == names.model_type) return names.family;
    known.push_back(names.model_type);
  }
  throw core::UserError(fmt::format("models: {}: unknown model_type: '{}'", origin, type),
                        core::name_hint(type, known));
}

std::string joined(const std::vector<std::string>& lines) { return fmt::format("\n  {}", fmt::join(lines, "\n  ")); }

void add_linear(NamedShapes& list, const std::string& path, int64_t out, int64_t in, bool bias) {
  list.emplace_back(path + ".weight", Shape{out, in});
  if (bias) list.emplace_back(path + ".bias", Shape{out});
}

void add_expert(NamedShapes& list, const std::string& path, const DecoderConfig& c, int64_t rank, bool bias) {
  for (const char* name : {"gate_proj", "up_proj", "down_proj"}) {
    const bool down = std::string_view(name) == "down_proj";
    const int64_t in = down ? c.intermediate_size : c.hidden_size, out = down ? c.hidden_size : c.intermediate_size;
    if (rank == 0) {
      add_linear(list, path + "." + name, out, in, bias);
    } else {
      add_linear(list, path + "." + name + "_a", rank, in, false);
      add_linear(list, path + "." + name + "_b", out, rank, false);
    }
  }
}

}  // namespace

DecoderConfig DecoderConfig::from_directory(const std::filesystem::path& directory) {
  const auto file = directory / "config.json";
  return from_json(core::read_json(file), file.string());
}

DecoderConfig DecoderConfig::from_json(const Json& json, const std::string& origin) {
  DecoderConfig c;
  c.family = family_of(json, origin);
  const FamilyTraits& traits = traits_of(c.family);
  std::vector<std::string> wrong;
  ConfigKeys read(json, wrong);
  read.find("model_type");
  for (size_t i = 0; i < kRequiredSizes; ++i) c.*kSizes[i].member = read.integer(kSizes[i].key, std::nullopt);
  const bool kv_assumed = traits.kv_heads > 0 && !read.contains("num_key_value_heads");
  c.num_kv_heads = read.integer("num_key_value_heads", kv_assumed ? traits.kv_heads : c.num_heads);
  c.head_dim = read.integer("head_dim", c.num_heads > 0 ? c.hidden_size / c.num_heads : 0);
  c.max_position_embeddings = read.integer("max_position_embeddings", traits.positions);
  c.rms_norm_eps = read.number("rms_norm_eps", traits.eps);
  read_rope(read, c, traits.theta);
  if (c.family == Family::kMistral || c.family == Family::kQwen2) read_window(read, c);
  c.initializer_range = read.number("initializer_range", 0.02);
  c.tie_word_embeddings = read.boolean("tie_word_embeddings", false);
  c.bos_token_id = read.any("bos_token_id");
  c.eos_token_id = read.any("eos_token_id");
  c.pad_token_id = read.any("pad_token_id");
  read.only("hidden_act", "silu");
  read.only("clip_qkv", nullptr);
  read.only("pretraining_tp", 1);
  if (c.family == Family::kLlama) {
    c.attention_bias = read.boolean("attention_bias", false);
    c.mlp_bias = read.boolean("mlp_bias", false);
  } else {
    read.only("attention_bias", false);
  }
  if (c.is_mixture()) {
    c.num_experts = read.integer("num_experts", std::nullopt);
    c.num_experts_per_tok = read.integer("num_experts_per_tok", std::nullopt);
    c.norm_topk_prob = read.boolean("norm_topk_prob", false);
    read.only("output_router_logits", false);
  }
  if (c.family == Family::kFlexMore) c.expert_ranks = read.integers("expert_ranks");
  read.refuse_unread({"attention_dropout", "is_decoder", "router_aux_loss_coef"});
  if (wrong.empty()) wrong = c.problems();
  if (!wrong.empty()) {
    throw core::UserError(fmt::format("models: {}: cannot build this model:{}", origin, joined(wrong)),
                          "use a checkpoint of a supported architecture, or correct these keys");
  }
  return c;
}

std::vector<std::string> DecoderConfig::problems() const {
  std::vector<std::string> wrong;
  const auto require = [&](bool good, std::string what) {
    if (!good) wrong.push_back(std::move(what));
  };
  for (const SizeKey& size : kSizes)
    require(this->*size.member > 0, fmt::format("'{}' must be positive: {}", size.key, this->*size.member));
  require(num_experts > 0, fmt::format("'num_experts' must be positive: {}", num_experts));
  const auto real = [](int64_t size) { return static_cast<double>(size); };
  const double attention = 2 * real(hidden_size) * real(head_dim) * (real(num_heads) + real(num_kv_heads));
  const double ffn = 3 * real(hidden_size) * real(intermediate_size) * real(num_experts);
  if (const auto implausible = implausible_sizes(
          num_layers, {vocab_size, hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, num_experts},
          2 * real(vocab_size) * real(hidden_size) + real(num_layers) * (attention + ffn)))
    wrong.push_back(*implausible);
  require(rms_norm_eps > 0, fmt::format("'rms_norm_eps' must be positive: {}", rms_norm_eps));
  require(rope_theta > 0, fmt::format("'rope_theta' must be positive: {}", rope_theta));
  require(initializer_range >= 0, fmt::format("'initializer_range' must not be negative: {}", initializer_range));
  require(head_dim % 2 == 0, fmt::format("'head_dim' must be even for rotary embeddings: {}", head_dim));
  if (rope_scaling.type == RopeScaling::Type::kLlama3)
    require(rope_scaling.high_freq_factor > rope_scaling.low_freq_factor,
            fmt::format("'rope_scaling': high_freq_factor {} must be above low_freq_factor {}",
                        rope_scaling.high_freq_factor, rope_scaling.low_freq_factor));
  require(
      num_kv_heads <= 0 || num_heads % num_kv_heads == 0,
      fmt::format("'num_key_value_heads' = {} does not divide 'num_attention_heads' = {}", num_kv_heads, num_heads));
  require(num_experts_per_tok >= 1 && num_experts_per_tok <= num_experts,
          fmt::format("'num_experts_per_tok' must be in 1..{}: {}", num_experts, num_experts_per_tok));
  if (family != Family::kFlexMore) return wrong;
  require(static_cast<int64_t>(expert_ranks.size()) == num_experts,
          fmt::format("'expert_ranks' has {} entries for {} experts", expert_ranks.size(), num_experts));
  require(!expert_ranks.empty() && expert_ranks[0] == 0,
          "'expert_ranks' must begin with 0: the public expert is full-size");
  for (const int64_t rank : expert_ranks) {
    require(rank >= 0 && rank <= max_rank(),
            fmt::format("'expert_ranks' must be in 0..{}, the smaller side of the FFN: {}", max_rank(), rank));
  }
  return wrong;
}

Json DecoderConfig::to_json() const {
  const FamilyTraits& traits = traits_of(family);
  Json json = {{"model_type", traits.model_type},
               {"architectures", {traits.architecture}},
               {"rms_norm_eps", rms_norm_eps},
               {"rope_theta", rope_theta},
               {"rope_scaling", nullptr},
               {"hidden_act", "silu"},
               {"initializer_range", initializer_range},
               {"tie_word_embeddings", tie_word_embeddings},
               {"attention_bias", attention_bias},
               {"bos_token_id", bos_token_id},
               {"eos_token_id", eos_token_id},
               {"pad_token_id", pad_token_id}};
  for (const SizeKey& size : kSizes) json[size.key] = this->*size.member;
  if (rope_scaling.type == RopeScaling::Type::kLinear)
    json["rope_scaling"] = {{"rope_type", "linear"}, {"factor", rope_scaling.factor}};
  if (rope_scaling.type == RopeScaling::Type::kLlama3)
    json["rope_scaling"] = {{"rope_type", "llama3"},
                            {"factor", rope_scaling.factor},
                            {"low_freq_factor", rope_scaling.low_freq_factor},
                            {"high_freq_factor", rope_scaling.high_freq_factor},
                            {"original_max_position_embeddings", rope_scaling.original_max_position_embeddings}};
  if (family == Family::kLlama) json["mlp_bias"] = mlp_bias;
  if (family == Family::kMistral || family == Family::kQwen2)
    json["sliding_window"] = sliding_window > 0 ? Json(sliding_window) : Json(nullptr);
  if (family == Family::kQwen2)
    json["use_sliding_window"] = sliding_window > 0, json["max_window_layers"] = max_window_layers;
  if (is_mixture()) {
    json["num_experts"] = num_experts;
    json["num_experts_per_tok"] = num_experts_per_tok;
    json["norm_topk_prob"] = norm_topk_prob;
  }
  if (family == Family::kFlexMore) json["expert_ranks"] = expert_ranks;
  return json;
}

int64_t DecoderConfig::shared_parameters() const {
  const int64_t d = hidden_size, q = num_heads * head_dim, kv = num_kv_heads * head_dim;
  const int64_t attention = 2 * d * q + 2 * d * kv + (qkv_bias() ? q + 2 * kv : 0) + (attention_bias ? d : 0);
  const int64_t norms = 2 * d + (post_norm() ? q + kv : 0);
  return (tie_word_embeddings ? 1 : 2) * vocab_size * d + num_layers * (attention + norms) + d;
}

int64_t DecoderConfig::ffn_parameters() const {
  return num_layers * (3 * hidden_size * intermediate_size + (mlp_bias ? 2 * intermediate_size + hidden_size : 0));
}

int64_t DecoderConfig::low_rank_parameters(int64_t rank) const {
  return rank * 3 * (hidden_size + intermediate_size) * num_layers;
}

int64_t DecoderConfig::router_parameters(int64_t experts) const { return experts * num_layers * hidden_size; }

int64_t DecoderConfig::total_parameters() const {
  int64_t total = shared_parameters() + ffn_parameters();
  if (!is_mixture()) return total;
  total += router_parameters(num_experts);
  for (int64_t expert = 1; expert < num_experts; ++expert) {
    total += rank_of(expert) > 0 ? low_rank_parameters(rank_of(expert)) : ffn_parameters();
  }
  return total;
}

std::string layer_path(int64_t layer) { return fmt::format("model.layers.{}", layer); }

NamedShapes expected_tensors(const DecoderConfig& c) {
  NamedShapes list = {{"model.embed_tokens.weight", {c.vocab_size, c.hidden_size}},
                      {"model.norm.weight", {c.hidden_size}}};
  if (!c.tie_word_embeddings) list.emplace_back("lm_head.weight", Shape{c.vocab_size, c.hidden_size});
  const int64_t d = c.hidden_size, q = c.num_heads * c.head_dim, kv = c.num_kv_heads * c.head_dim;
  for (int64_t layer = 0; layer < c.num_layers; ++layer) {
    const std::string path = layer_path(layer), attention = path + ".self_attn";
    add_linear(list, attention + ".q_proj", q, d, c.qkv_bias());
    add_linear(list, attention + ".k_proj", kv, d, c.qkv_bias());
    add_linear(list, attention + ".v_proj", kv, d, c.qkv_bias());
    add_linear(list, attention + ".o_proj", d, q, c.attention_bias);
    if (c.post_norm()) {
      list.emplace_back(attention + ".q_norm.weight", Shape{q});
      list.emplace_back(attention + ".k_norm.weight", Shape{kv});
      list.emplace_back(path + ".post_feedforward_layernorm.weight", Shape{d});
    } else {
      list.emplace_back(path + ".input_layernorm.weight", Shape{d});
    }
    list.emplace_back(path + ".post_attention_layernorm.weight", Shape{d});
    if (!c.is_mixture()) {
      add_expert(list, path + ".mlp", c, 0, c.mlp_bias);
      continue;
    }
    list.emplace_back(path + ".mlp.gate.weight", Shape{c.num_experts, d});
    for (int64_t expert = 0; expert < c.num_experts; ++expert) {
      add_expert(list, fmt::format("{}.mlp.experts.{}", path, expert), c, c.rank_of(expert), false);
    }
  }
  std::sort(list.begin(), list.end());
  return list;
}

}  // namespace moraine::models
