// adapter_config.json of Hugging Face PEFT 0.21: its fields, their defaults and which of them matter here.
#include <algorithm>
#include <cctype>
#include <cmath>
#include <limits>
#include <set>

#include "algorithms/adapters/config.h"
#include "algorithms/adapters/lora.h"
#include "core/error.h"
#include "core/log.h"

namespace moraine::algorithms::adapters {
namespace {

const core::Json& peft_defaults() {
  static const core::Json defaults = core::Json::parse(R"({
    "alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "auto_mapping": null,
    "base_model_name_or_path": null, "bias": "none", "corda_config": null, "ensure_weight_tying": false,
    "eva_config": null, "exclude_modules": null, "fan_in_fan_out": false, "inference_mode": true,
    "init_lora_weights": true, "kasa_config": null, "layer_replication": null, "layers_pattern": null,
    "layers_to_transform": null, "loftq_config": {}, "lora_alpha": 8, "lora_bias": false, "lora_dropout": 0.0,
    "lora_ga_config": null, "megatron_config": null, "megatron_core": "megatron.core", "modules_to_save": null,
    "monteclora_config": null, "peft_type": "LORA", "peft_version": "0.21.0", "qalora_group_size": 16, "r": 8,
    "rank_pattern": {}, "revision": null, "target_modules": null, "target_parameters": null, "task_type": null,
    "trainable_token_indices": null, "use_bdlora": null, "use_dora": false, "use_qalora": false,
    "use_rslora": false, "velora_config": null})");
  return defaults;
}

/// Read below, or without influence on what a trained adapter computes.
const std::set<std::string>& understood_fields() {
  static const std::set<std::string> fields = core::Json::parse(R"([
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "target_modules", "task_type", "use_dora", "use_rslora"])")
                                                  .get<std::set<std::string>>();
  return fields;
}

bool is_off(const core::Json& value) {
  return value.is_null() || value == false || (value.is_structured() && value.empty());
}

/// Fields we neither know nor may ignore.
void check_fields(const core::Json& json, const std::string& origin) {
  for (const auto& [key, value] : json.items()) {
    if (understood_fields().contains(key)) continue;
    const auto known = peft_defaults().find(key);
    if (known == peft_defaults().end()) {
      core::log::warn("unknown field of an adapter kept but not used: file={} field={}", origin, key);
    } else if (value != *known && !is_off(value)) {
      throw core::UserError(
          fmt::format("algorithms/adapters: {}: option not implemented: {}={}", origin, key, value.dump()),
          "only plain LoRA and rsLoRA can be read; merge this adapter in PEFT (merge_and_unload) instead");
    }
  }
}

void check_init(const core::Json& init, const std::string& origin) {
  if (init.is_boolean() || init == "gaussian" || init == "eva" || init == "orthogonal") return;
  throw core::UserError(
      fmt::format("algorithms/adapters: {}: init_lora_weights {} changes the base weights", origin, init.dump()),
      "save the adapter in PEFT with path_initial_model_for_weight_conversion, which turns it into plain LoRA");
}

/// A list of names, or text that is a regular expression.
void read_modules(const core::Json& value, std::vector<std::string>& list, std::string& regex) {
  if (value.is_null()) return;
  if (value.is_array()) {
    list = value.get<std::vector<std::string>>();
  } else {
    regex = value.get<std::string>();
  }
}

/// Targets may also be the words all-linear, in any case.
void read_targets(const core::Json& value, AdapterConfig& config) {
  config.target_modules.clear();
  read_modules(value, config.target_modules, config.target_regex);
  std::string lower = config.target_regex;
  std::transform(lower.begin(), lower.end(), lower.begin(), [](unsigned char c) { return std::tolower(c); });
  if (lower != "all-linear") return;
  config.target_regex.clear();
  config.target_modules = {lower};
}

/// JSON for numbers has one type; a rank of 8.5 is none.
int64_t whole(const core::Json& value) {
  const double number = value.get<double>();
  if (value.is_boolean() || number != std::floor(number) || std::abs(number) > 1e15)
    throw core::UserError(fmt::format("algorithms/adapters: not a whole number: {}", value.dump()),
                          "ranks and layers are counted");
  return static_cast<int64_t>(number);
}

/// A factor that tensors of floats are multiplied by.
double factor(const core::Json& value) {
  const double number = value.get<double>();
  if (!(std::abs(number) <= std::numeric_limits<float>::max()))
    throw core::UserError(fmt::format("algorithms/adapters: no float holds {}", value.dump()), "correct the alpha");
  return number;
}

/// One number, or a list of them.
std::vector<int64_t> whole_numbers(const core::Json& value) {
  std::vector<int64_t> list;
  if (value.is_null()) return list;
  if (!value.is_array()) return {whole(value)};
  for (const auto& item : value) list.push_back(whole(item));
  return list;
}

core::Json number(double value) {
  return value == std::floor(value) ? core::Json(static_cast<int64_t>(value)) : core::Json(value);
}

}  // namespace

core::Json lora_peft_config(const AdapterConfig& config) {
  core::Json json = peft_defaults();
  // One that started from the base is written as the plain LoRA of twice the rank, at the same scale.
  const int64_t times = starts_from_base(config) ? 2 : 1;
  const double alpha_times = starts_from_base(config) ? (config.use_rslora ? std::sqrt(2.0) : 2.0) : 1.0;
  json["r"] = times * config.rank;
  json["lora_alpha"] = number(alpha_times * config.alpha);
  json["lora_dropout"] = config.dropout;
  json["target_modules"] = config.target_modules;
  if (config.target_modules == std::vector<std::string>{"all-linear"}) json["target_modules"] = "all-linear";
  if (!config.target_regex.empty()) json["target_modules"] = config.target_regex;
  if (!config.exclude_modules.empty()) json["exclude_modules"] = config.exclude_modules;
  if (!config.exclude_regex.empty()) json["exclude_modules"] = config.exclude_regex;
  if (!config.layers_to_transform.empty()) json["layers_to_transform"] = config.layers_to_transform;
  for (const auto& [module, rank] : config.rank_pattern) json["rank_pattern"][module] = times * rank;
  for (const auto& [module, alpha] : config.alpha_pattern) json["alpha_pattern"][module] = number(alpha_times * alpha);
  if (config.init == "gaussian") json["init_lora_weights"] = "gaussian";
  json["use_rslora"] = config.use_rslora;
  return json;
}

AdapterConfig config_from_peft(const core::OrderedJson& ordered, const std::string& origin) {
  const core::Json json = ordered;
  if (!json.is_object() || json.value("peft_type", core::Json()) != "LORA") {
    throw core::UserError(fmt::format("algorithms/adapters: {}: peft_type is {}, not \"LORA\"", origin,
                                      json.is_object() ? json.value("peft_type", core::Json()).dump() : "missing"),
                          "only LoRA adapters can be read");
  }
  check_fields(json, origin);
  try {
    AdapterConfig config;
    core::Json values = peft_defaults();
    values.update(json);
    check_init(values.at("init_lora_weights"), origin);
    if (values.at("init_lora_weights") == "gaussian") config.init = "gaussian";
    config.rank = whole(values.at("r"));
    config.alpha = factor(values.at("lora_alpha"));
    config.use_rslora = values.at("use_rslora");
    read_targets(values.at("target_modules"), config);
    read_modules(values.at("exclude_modules"), config.exclude_modules, config.exclude_regex);
    config.layers_to_transform = whole_numbers(values.at("layers_to_transform"));
    if (const auto ranks = ordered.find("rank_pattern"); ranks != ordered.end() && !ranks->is_null())
      for (const auto& [module, rank] : ranks->get_ref<const core::OrderedJson::object_t&>())
        config.rank_pattern.push_back({module, whole(rank)});
    if (const auto alphas = ordered.find("alpha_pattern"); alphas != ordered.end() && !alphas->is_null())
      for (const auto& [module, alpha] : alphas->get_ref<const core::OrderedJson::object_t&>())
        config.alpha_pattern.push_back({module, factor(alpha)});
    config.dropout = values.at("lora_dropout").get<double>();
    if (values.at("use_dora") == true) config.type = "dora";
    return config;
  } catch (const core::Json::exception& error) {
    throw core::UserError(fmt::format("algorithms/adapters: {}: a field has the wrong type: {}", origin, error.what()),
                          "compare the file with one that PEFT 0.21 has written");
  }
}

}  // namespace moraine::algorithms::adapters
