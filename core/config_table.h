#pragma once

// Part of core/config.h: what a Schema knows about its fields without knowing their C++ types. Not for direct use.
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/json.h"

namespace moraine::core {
struct ConfigNode;
class Problems;
struct ResolvedValue;
}  // namespace moraine::core

namespace moraine::core::config_detail {

enum class ValueType { kBool, kInteger, kNumber, kText, kObject, kAny };  // kAny: a JSON value as it is

/// What a key can change: results (artefacts), only what is measured or drawn from them, or neither.
enum class Effect { kResult, kEvaluation, kNothing };

struct FieldInfo;
using Table = std::vector<FieldInfo>;

struct FieldInfo {
  std::string name = {}, doc = {}, unit = {};
  ValueType type = ValueType::kText;
  bool list = false, optional = false, required = false, min_exclusive = false, is_path = false;
  bool is_unsigned = false;   // of a kInteger: up to 2^64 - 1
  bool map = false;           // of a kObject: names of the user's choice, each with an object of `nested`
  bool unique = false;        // of a list: no item stands twice
  bool joined_later = false;  // left out of to_json() while it has its default
  Effect effect = Effect::kResult;
  std::optional<double> min = {}, max = {};
  std::vector<std::string> choices = {};
  std::shared_ptr<const Table> nested = {};  // of a kObject; null for a kAny
  Json default_value = {};
};

std::string child_path(const std::string& path, const std::string& name);

/// False when the node is no map (an empty one counts as a map). Reports unknown keys and missing required ones.
bool check_keys(const Table& table, const ConfigNode& node, const std::string& path, Problems& problems);
/// Types and bounds one field; nullopt when a problem was reported. Objects are left to their own Schema.
std::optional<Json> parse_value(const FieldInfo& info, const ConfigNode& node, const std::string& path,
                                Problems& problems);
/// The items of a list node; nullptr when a problem was reported.
const std::vector<ConfigNode>* parse_items(const ConfigNode& node, const std::string& path, Problems& problems);

/// The members of a map node by name; nullptr when a problem was reported.
const std::vector<std::pair<std::string, ConfigNode>>* parse_members(const ConfigNode& node, const std::string& path,
                                                                     Problems& problems);

/// `value` holds every field of the table.
void resolve(const Table& table, const ConfigNode* node, const std::string& path, const Json& value,
             std::vector<ResolvedValue>& out);
/// `value` (of to_json()) without what never changes a result: fields of Effect::kNothing, and paths, whose files count
/// by content.
Json identity(const Table& table, const Json& value);
/// A tree as if `json` had been read from a file, with every field of the table required.
ConfigNode complete_node(const Table& table, const Json& json, const std::string& path, Problems& problems);
Json json_schema(const Table& table, bool is_root);
std::string markdown(const Table& table, const std::string& path);

}  // namespace moraine::core::config_detail
