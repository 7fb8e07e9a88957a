#include "models/config_keys.h"

#include <algorithm>
#include <array>

#include <fmt/format.h>

namespace moraine::models {
namespace {

using core::Json;

// No forward pass over frozen weights depends on these, whatever the model.
constexpr std::array kIrrelevant = {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"};

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
    if (key.starts_with('_') || listed(kIrrelevant, key) || listed(irrelevant, key)) continue;
    if (seen_.contains(key) || value.is_null()) continue;
    wrong(fmt::format("'{}' = {} is not known for this model type; it may change the model", key, value.dump()));
  }
}

}  // namespace moraine::models
