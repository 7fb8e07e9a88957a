// adapter_config.json of PEFT's LORA, which DoRA is one of: its fields, their defaults and which of them matter here.
#include <cmath>
#include <limits>

#include "algorithms/adapters/lora.h"
#include "algorithms/adapters/peft_fields.h"
#include "core/error.h"

namespace moraine::algorithms::adapters {
namespace {

const PeftFields& lora_fields() {
  static const PeftFields fields = peft_fields("LORA", R"({
    "alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "bias": "none", "corda_config": null,
    "ensure_weight_tying": false, "eva_config": null, "exclude_modules": null, "fan_in_fan_out": false,
    "init_lora_weights": true, "kasa_config": null, "layer_replication": null, "layers_pattern": null,
    "layers_to_transform": null, "loftq_config": {}, "lora_alpha": 8, "lora_bias": false, "lora_dropout": 0.0,
    "lora_ga_config": null, "megatron_config": null, "megatron_core": "megatron.core", "modules_to_save": null,
    "monteclora_config": null, "qalora_group_size": 16, "r": 8, "rank_pattern": {}, "target_parameters": null,
    "trainable_token_indices": null, "use_bdlora": null, "use_dora": false, "use_qalora": false, "use_rslora": false,
    "velora_config": null})",
                                               R"([
    "alpha_pattern", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "init_lora_weights",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config",
    "megatron_core", "qalora_group_size", "r", "rank_pattern", "use_dora", "use_rslora"])");
  return fields;
}

void check_init(const core::Json& init, const std::string& origin) {
  if (init.is_boolean() || init == "gaussian" || init == "eva" || init == "orthogonal") return;
  throw core::UserError(
      fmt::format("algorithms/adapters: {}: init_lora_weights {} changes the base weights", origin, init.dump()),
      "save the adapter in PEFT with path_initial_model_for_weight_conversion, which turns it into plain LoRA");
}

/// A factor that tensors of floats are multiplied by.
double factor(const core::Json& value) {
  const double number = value.get<double>();
  if (!(std::abs(number) <= std::numeric_limits<float>::max()))
    throw core::UserError(fmt::format("algorithms/adapters: no float holds {}", value.dump()), "correct the alpha");
  return number;
}

core::Json number(double value) {
  return value == std::floor(value) ? core::Json(static_cast<int64_t>(value)) : core::Json(value);
}

}  // namespace

core::Json lora_peft_config(const AdapterConfig& config) {
  core::Json json = lora_fields().defaults;
  // One that started from the base is written as the plain LoRA of twice the rank, at the same scale.
  const int64_t times = starts_from_base(config) ? 2 : 1;
  const double alpha_times = starts_from_base(config) ? (config.use_rslora ? std::sqrt(2.0) : 2.0) : 1.0;
  json["r"] = times * config.rank;
  json["lora_alpha"] = number(alpha_times * config.alpha);
  json["lora_dropout"] = config.dropout;
  write_targets(config, json);
  for (const auto& [module, rank] : config.rank_pattern) json["rank_pattern"][module] = times * rank;
  for (const auto& [module, alpha] : config.alpha_pattern) json["alpha_pattern"][module] = number(alpha_times * alpha);
  if (config.init == "gaussian") json["init_lora_weights"] = "gaussian";
  json["use_rslora"] = config.use_rslora;
  json["use_dora"] = config.type == "dora";
  return json;
}

AdapterConfig lora_config_from_peft(const core::OrderedJson& json, const std::string& origin) {
  return read_peft(json, lora_fields(), origin, [&](const core::Json& values, AdapterConfig& config) {
    check_init(values.at("init_lora_weights"), origin);
    if (values.at("init_lora_weights") == "gaussian") config.init = "gaussian";
    config.rank = whole_number(values.at("r"));
    config.alpha = factor(values.at("lora_alpha"));
    config.use_rslora = values.at("use_rslora");
    // Patterns in the order of the file.
    if (const auto ranks = json.find("rank_pattern"); ranks != json.end() && !ranks->is_null())
      for (const auto& [module, rank] : ranks->get_ref<const core::OrderedJson::object_t&>())
        config.rank_pattern.push_back({module, whole_number(rank)});
    if (const auto alphas = json.find("alpha_pattern"); alphas != json.end() && !alphas->is_null())
      for (const auto& [module, alpha] : alphas->get_ref<const core::OrderedJson::object_t&>())
        config.alpha_pattern.push_back({module, factor(alpha)});
    config.dropout = values.at("lora_dropout").get<double>();
    if (values.at("use_dora") == true) config.type = "dora";
  });
}

}  // namespace moraine::algorithms::adapters
