#include "models/decoder_config.h"

#include <algorithm>
#include <array>
#include <optional>
#include <set>

#include "core/error.h"
#include "core/registry.h"

namespace moraine::models {
namespace {

using core::Json;
using Family = DecoderConfig::Family;

struct FamilyNames {
  Family family;
  const char* model_type;
  const char* architecture;
};
constexpr std::array<FamilyNames, 4> kFamilies = {{
    {Family::kFlexMore, "flexmore", "FlexMoREForCausalLM"},
    {Family::kFlexOlmo, "flex_olmo", "FlexOlmoForCausalLM"},
    {Family::kLlama, "llama", "LlamaForCausalLM"},
    {Family::kOlmo2, "olmo2", "Olmo2ForCausalLM"},
}};

const FamilyNames& names_of(Family family) {
  return *std::find_if(kFamilies.begin(), kFamilies.end(), [&](const FamilyNames& n) { return n.family == family; });
}

// No forward pass over frozen weights depends on these. Keys that start with '_' are transformers' own notes.
constexpr std::array kIrrelevant = {"architectures",       "attention_dropout",    "dtype",
                                    "torch_dtype",         "transformers_version", "use_cache",
                                    "router_aux_loss_coef"};

/// Reads one config.json, remembers what was read and collects what is wrong.
class KeyReader {
 public:
  KeyReader(const Json& json, std::vector<std::string>& problems) : json_(json), problems_(problems) {}

  const Json* find(const std::string& key) {
    seen_.insert(key);
    const auto at = json_.find(key);
    return at == json_.end() || at->is_null() ? nullptr : &*at;
  }

  Json any(const std::string& key) {
    const Json* value = find(key);
    return value == nullptr ? Json() : *value;
  }
  int64_t integer(const std::string& key, std::optional<int64_t> absent) {
    const Json* value = find(key);
    if (value != nullptr && value->is_number_integer()) return value->get<int64_t>();
    if (value != nullptr) problems_.push_back(fmt::format("'{}' must be an integer: {}", key, value->dump()));
    if (value == nullptr && !absent) problems_.push_back(fmt::format("'{}' is missing", key));
    return absent.value_or(1);
  }
  double number(const std::string& key, double absent) {
    const Json* value = find(key);
    if (value != nullptr && !value->is_number())
      problems_.push_back(fmt::format("'{}' must be a number: {}", key, value->dump()));
    return value != nullptr && value->is_number() ? value->get<double>() : absent;
  }
  bool boolean(const std::string& key, bool absent) {
    const Json* value = find(key);
    if (value != nullptr && !value->is_boolean())
      problems_.push_back(fmt::format("'{}' must be true or false: {}", key, value->dump()));
    return value != nullptr && value->is_boolean() ? value->get<bool>() : absent;
  }
  std::vector<int64_t> integers(const std::string& key) {
    const Json* value = find(key);
    const bool good = value != nullptr && value->is_array() &&
                      std::all_of(value->begin(), value->end(), [](const Json& v) { return v.is_number_integer(); });
    if (good) return value->get<std::vector<int64_t>>();
    problems_.push_back(
        fmt::format("'{}' must be a list of integers: {}", key, value == nullptr ? "missing" : value->dump()));
    return {};
  }
  /// Options that change the mathematics and are not implemented: absent, null or `neutral`.
  void only(const std::string& key, const Json& neutral) {
    const Json* value = find(key);
    if (value != nullptr && *value != neutral) {
      problems_.push_back(fmt::format("'{}' = {} is not implemented (only {})", key, value->dump(), neutral.dump()));
    }
  }
  /// rope_theta, or transformers 5's rope_parameters {rope_type, rope_theta}; scaled variants are refused.
  double rope_theta(double absent) {
    double theta = number("rope_theta", absent);
    for (const char* key : {"rope_scaling", "rope_parameters"}) {
      const Json* rope = find(key);
      if (rope == nullptr) continue;
      const Json type =
          rope->is_object() ? rope->value("rope_type", rope->value("type", Json("default"))) : Json(nullptr);
      for (const auto& [name, value] : rope->items()) {
        const bool known = name == "rope_theta" ? value.is_number() : name == "rope_type" || name == "type";
        if (!known || type != "default") {
          problems_.push_back(
              fmt::format("'{}' = {} is not implemented (only the default rotary embedding)", key, rope->dump()));
          break;
        }
        if (name == "rope_theta") theta = value.get<double>();
      }
    }
    return theta;
  }
  void refuse_unread() {
    for (const auto& [key, value] : json_.items()) {
      const bool irrelevant =
          key.starts_with('_') || std::find(kIrrelevant.begin(), kIrrelevant.end(), key) != kIrrelevant.end();
      if (irrelevant || seen_.contains(key) || value.is_null()) continue;
      problems_.push_back(
          fmt::format("'{}' = {} is not known for this model type; it may change the model", key, value.dump()));
    }
  }

 private:
  const Json& json_;
  std::vector<std::string>& problems_;
  std::set<std::string> seen_;
};

Family family_of(const Json& json, const std::string& origin) {
  const std::string type = json.is_object() && json.contains("model_type") && json["model_type"].is_string()
                               ? json["model_type"].get<std::string>()
                               : "";
  std::vector<std::string> known;
  for (const FamilyNames& names : kFamilies) {
    if (type == names.model_type) return names.family;
    known.push_back(names.model_type);
  }
  throw core::UserError(fmt::format("models: {}: unknown model_type: '{}'", origin, type),
                        core::name_hint(type, known));
}

std::string joined(const std::vector<std::string>& lines) { return fmt::format("\n  {}", fmt::join(lines, "\n  ")); }

void add_linear(NamedShapes& list, const std::string& path, int64_t out, int64_t in,
                bool bias) {
  list.emplace_back(path + ".weight", Shape{out, in});
  if (bias) list.emplace_back(path + ".bias", Shape{out});
}

void add_expert(NamedShapes& list, const std::string& path, const DecoderConfig& c,
                int64_t rank, bool bias) {
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

DecoderConfig DecoderConfig::from_json(const Json& json, const std::string& origin) {
  DecoderConfig c;
  c.family = family_of(json, origin);
  const bool flex = c.is_mixture(), llama = c.family == Family::kLlama;
  std::vector<std::string> wrong;
  KeyReader read(json, wrong);
  read.find("model_type");
  c.vocab_size = read.integer("vocab_size", std::nullopt);
  c.hidden_size = read.integer("hidden_size", std::nullopt);
  c.intermediate_size = read.integer("intermediate_size", std::nullopt);
  c.num_layers = read.integer("num_hidden_layers", std::nullopt);
  c.num_heads = read.integer("num_attention_heads", std::nullopt);
  c.num_kv_heads = read.integer("num_key_value_heads", c.num_heads);
  c.head_dim = read.integer("head_dim", c.num_heads > 0 ? c.hidden_size / c.num_heads : 0);
  c.max_position_embeddings = read.integer("max_position_embeddings", flex ? 4096 : 2048);
  c.rms_norm_eps = read.number("rms_norm_eps", c.family == Family::kOlmo2 ? 1e-5 : 1e-6);
  c.rope_theta = read.rope_theta(flex ? 500000 : 10000);
  c.initializer_range = read.number("initializer_range", 0.02);
  c.tie_word_embeddings = read.boolean("tie_word_embeddings", false);
  c.bos_token_id = read.any("bos_token_id");
  c.eos_token_id = read.any("eos_token_id");
  c.pad_token_id = read.any("pad_token_id");
  read.only("hidden_act", "silu");
  read.only("clip_qkv", nullptr);
  read.only("pretraining_tp", 1);
  if (llama) {
    c.attention_bias = read.boolean("attention_bias", false);
    c.mlp_bias = read.boolean("mlp_bias", false);
  } else {
    read.only("attention_bias", false);
  }
  if (flex) {
    c.num_experts = read.integer("num_experts", std::nullopt);
    c.num_experts_per_tok = read.integer("num_experts_per_tok", std::nullopt);
    c.norm_topk_prob = read.boolean("norm_topk_prob", false);
    read.only("output_router_logits", false);
  }
  if (c.family == Family::kFlexMore) c.expert_ranks = read.integers("expert_ranks");
  read.refuse_unread();
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
  const std::pair<const char*, int64_t> sizes[] = {{"vocab_size", vocab_size},
                                                   {"hidden_size", hidden_size},
                                                   {"intermediate_size", intermediate_size},
                                                   {"num_hidden_layers", num_layers},
                                                   {"num_attention_heads", num_heads},
                                                   {"num_key_value_heads", num_kv_heads},
                                                   {"head_dim", head_dim},
                                                   {"max_position_embeddings", max_position_embeddings},
                                                   {"num_experts", num_experts}};
  for (const auto& [key, value] : sizes) require(value > 0, fmt::format("'{}' must be positive: {}", key, value));
  require(rms_norm_eps > 0, fmt::format("'rms_norm_eps' must be positive: {}", rms_norm_eps));
  require(rope_theta > 0, fmt::format("'rope_theta' must be positive: {}", rope_theta));
  require(initializer_range >= 0, fmt::format("'initializer_range' must not be negative: {}", initializer_range));
  require(head_dim % 2 == 0, fmt::format("'head_dim' must be even for rotary embeddings: {}", head_dim));
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
  const FamilyNames& names = names_of(family);
  Json json = {{"model_type", names.model_type},
               {"architectures", {names.architecture}},
               {"vocab_size", vocab_size},
               {"hidden_size", hidden_size},
               {"intermediate_size", intermediate_size},
               {"num_hidden_layers", num_layers},
               {"num_attention_heads", num_heads},
               {"num_key_value_heads", num_kv_heads},
               {"head_dim", head_dim},
               {"max_position_embeddings", max_position_embeddings},
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
  if (family == Family::kLlama) json["mlp_bias"] = mlp_bias;
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
  const int64_t attention = 2 * d * q + 2 * d * kv + (attention_bias ? q + 2 * kv + d : 0);
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
    add_linear(list, attention + ".q_proj", q, d, c.attention_bias);
    add_linear(list, attention + ".k_proj", kv, d, c.attention_bias);
    add_linear(list, attention + ".v_proj", kv, d, c.attention_bias);
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
