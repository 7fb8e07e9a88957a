#include "models/config_keys.h"

#include <algorithm>
#include <array>
#include <map>

#include <fmt/format.h>

namespace moraine::models {
namespace {

using core::Json;

// No forward pass over frozen weights depends on these, whatever the model.
constexpr std::array kIrrelevant = {
    // what files and tools note
    "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "is_llama_config", "name_or_path",
    "tokenizer_class", "gradient_checkpointing", "low_cpu_mem_usage", "attn_implementation", "finetuning_task",
    "task_specific_params", "torchscript", "use_bfloat16", "return_dict", "output_hidden_states", "output_attentions",
    "tf_legacy_loss", "output_past",
    // tokens and labels
    "bos_token_id", "eos_token_id", "eos_token_ids", "pad_token_id", "sep_token_id", "unk_token_id", "mask_token_id",
    "cls_token_id", "decoder_start_token_id", "prefix", "id2label", "label2id", "num_labels", "problem_type",
    // what `generate` reads
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "length_penalty", "max_length", "max_new_tokens", "min_length", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_return_sequences", "output_scores", "remove_invalid_values", "repetition_penalty",
    "return_dict_in_generate", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p"};
constexpr std::array kIrrelevantStarts = {"_", "unsloth_", "transformers."};

// Options that would change the model, and the value with which they do not.
const std::map<std::string, Json>& neutral_options() {
  static const std::map<std::string, Json> options = {
      {"add_cross_attention", false}, {"attention_bias", false},        {"chunk_size_feed_forward", 0},
      {"is_decoder", false},          {"is_encoder_decoder", false},    {"mlp_bias", false},
      {"partial_rotary_factor", 1.0}, {"pruned_heads", Json::object()}, {"qk_layernorm", false},
      {"rope_interleaved", false},    {"tie_encoder_decoder", false},   {"use_mrope", false},
      {"use_qk_norm", false},         {"use_sliding_window", false}};
  return options;
}

}  // namespace

const Json* ConfigKeys::find(const std::string& key) {
  seen_.insert(key);
  const auto at = json_.find(key);
  return at == json_.end() || at->is_null() ? nullptr : &*at;
}

Json ConfigKeys::any(const std::string& key) {
  const Json* value = find(key);
  return value == nullptr ? Json() : *value;
}

int64_t ConfigKeys::integer(const std::string& key, std::optional<int64_t> absent) {
  const Json* value = find(key);
  if (value != nullptr && value->is_number_integer()) return value->get<int64_t>();
  if (value != nullptr) wrong(fmt::format("'{}' must be an integer: {}", key, value->dump()));
  if (value == nullptr && !absent) wrong(fmt::format("'{}' is missing", key));
  return absent.value_or(1);
}

double ConfigKeys::number(const std::string& key, double absent) {
  const Json* value = find(key);
  if (value != nullptr && !value->is_number()) wrong(fmt::format("'{}' must be a number: {}", key, value->dump()));
  return value != nullptr && value->is_number() ? value->get<double>() : absent;
}

bool ConfigKeys::boolean(const std::string& key, bool absent) {
  const Json* value = find(key);
  if (value != nullptr && !value->is_boolean())
    wrong(fmt::format("'{}' must be true or false: {}", key, value->dump()));
  return value != nullptr && value->is_boolean() ? value->get<bool>() : absent;
}

std::vector<int64_t> ConfigKeys::integers(const std::string& key) {
  const Json* value = find(key);
  const bool good = value != nullptr && value->is_array() &&
                    std::all_of(value->begin(), value->end(), [](const Json& v) { return v.is_number_integer(); });
  if (good) return value->get<std::vector<int64_t>>();
  wrong(fmt::format("'{}' must be a list of integers: {}", key, value == nullptr ? "missing" : value->dump()));
  return {};
}

void ConfigKeys::only(const std::string& key, const Json& neutral) {
  const Json* value = find(key);
  if (value != nullptr && *value != neutral)
    wrong(fmt::format("'{}' = {} is not implemented (only {})", key, value->dump(), neutral.dump()));
}

void ConfigKeys::refuse_unread(const std::vector<std::string>& irrelevant) {
  const auto listed = [](const auto& keys, const std::string& key) {
    return std::find(keys.begin(), keys.end(), key) != keys.end();
  };
  for (const auto& [key, value] : json_.items()) {
    if (seen_.contains(key) || value.is_null() || listed(kIrrelevant, key) || listed(irrelevant, key)) continue;
    if (std::ranges::any_of(kIrrelevantStarts, [&](const char* start) { return key.starts_with(start); })) continue;
    if (const auto option = neutral_options().find(key); option != neutral_options().end()) {
      only(key, option->second);
      continue;
    }
    wrong(fmt::format("'{}' = {} is not known for this model type; it may change the model", key, value.dump()));
  }
}

std::optional<std::string> implausible_sizes(int64_t layers, std::initializer_list<int64_t> sides, double parameters) {
  constexpr int64_t kMostLayers = 100'000, kLongestSide = int64_t{1} << 31;
  constexpr double kMostParameters = 9007199254740992.0;  // 2^53: exact in JSON's numbers
  if (layers > kMostLayers)
    return fmt::format("{} layers are more than any model has (at most {})", layers, kMostLayers);
  for (const int64_t side : sides)
    if (side > kLongestSide) return fmt::format("a size of {} is more than any model has", side);
  if (parameters > kMostParameters) return fmt::format("{:.3g} parameters are more than any model has", parameters);
  return std::nullopt;
}

}  // namespace moraine::models
