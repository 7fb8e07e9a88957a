#include "algorithms/adapters/peft_fields.h"

#include <algorithm>
#include <cctype>
#include <cmath>

#include "core/error.h"
#include "core/log.h"

namespace moraine::algorithms::adapters {
namespace {

bool is_off(const core::Json& value) {
  return value.is_null() || value == false || (value.is_structured() && value.empty());
}

/// Fields we neither know nor may ignore.
void check_fields(const core::Json& json, const PeftFields& fields, const std::string& origin) {
  for (const auto& [key, value] : json.items()) {
    if (fields.read.contains(key)) continue;
    const auto known = fields.defaults.find(key);
    if (known == fields.defaults.end()) {
      core::log::warn("unknown field of an adapter kept but not used: file={} field={}", origin, key);
    } else if (value != *known && !is_off(value)) {
      throw core::UserError(
          fmt::format("algorithms/adapters: {}: option not implemented: {}={}", origin, key, value.dump()),
          "merge this adapter in PEFT (merge_and_unload) instead");
    }
  }
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

/// One number, or a list of them.
std::vector<int64_t> whole_numbers(const core::Json& value) {
  std::vector<int64_t> list;
  if (value.is_null()) return list;
  if (!value.is_array()) return {whole_number(value)};
  for (const auto& item : value) list.push_back(whole_number(item));
  return list;
}

}  // namespace

PeftFields peft_fields(const char* peft_type, const char* defaults, const char* read) {
  PeftFields fields{core::Json::parse(R"({
    "auto_mapping": null, "base_model_name_or_path": null, "inference_mode": true, "peft_version": "0.21.0",
    "revision": null, "target_modules": null, "task_type": null})"),
                    core::Json::parse(read).get<std::set<std::string>>()};
  for (const auto& [key, value] : fields.defaults.items()) fields.read.insert(key);
  fields.read.insert("peft_type");
  fields.defaults["peft_type"] = peft_type;
  fields.defaults.update(core::Json::parse(defaults));
  return fields;
}

void write_targets(const AdapterConfig& config, core::Json& json) {
  json["target_modules"] = config.target_modules;
  if (config.target_modules == std::vector<std::string>{"all-linear"}) json["target_modules"] = "all-linear";
  if (!config.target_regex.empty()) json["target_modules"] = config.target_regex;
  if (!config.exclude_modules.empty()) json["exclude_modules"] = config.exclude_modules;
  if (!config.exclude_regex.empty()) json["exclude_modules"] = config.exclude_regex;
  if (!config.layers_to_transform.empty()) json["layers_to_transform"] = config.layers_to_transform;
}

AdapterConfig read_peft(const core::OrderedJson& ordered, const PeftFields& fields, const std::string& origin,
                        const std::function<void(const core::Json& values, AdapterConfig& config)>& read_rest) {
  const core::Json json = ordered;
  check_fields(json, fields, origin);
  try {
    AdapterConfig config;
    core::Json values = fields.defaults;
    values.update(json);
    read_targets(values.at("target_modules"), config);
    read_modules(values.value("exclude_modules", core::Json()), config.exclude_modules, config.exclude_regex);
    config.layers_to_transform = whole_numbers(values.value("layers_to_transform", core::Json()));
    read_rest(values, config);
    return config;
  } catch (const core::Json::exception& error) {
    throw core::UserError(fmt::format("algorithms/adapters: {}: a field has the wrong type: {}", origin, error.what()),
                          "compare the file with one that PEFT 0.21 has written");
  }
}

int64_t whole_number(const core::Json& value) {
  const double number = value.get<double>();
  if (value.is_boolean() || number != std::floor(number) || std::abs(number) > 1e15)
    throw core::UserError(fmt::format("algorithms/adapters: not a whole number: {}", value.dump()),
                          "ranks and layers are counted");
  return static_cast<int64_t>(number);
}

}  // namespace moraine::algorithms::adapters
