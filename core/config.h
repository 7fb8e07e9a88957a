#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/json.h"

// YAML -> plain struct, once, at start-up. The only place that reads YAML. A struct's default member initialisers are its
// defaults; one Schema per struct drives parsing, range checks, `validate`, `--help`, the JSON schema and the docs.
namespace moraine::core {

/// Where a value came from: "recipe.yaml:12:3", "environment MORAINE_SEED", "command line", "default".
using Origin = std::string;

/// A YAML value with the place it came from. Scalars keep their text; typing happens against a Schema.
struct ConfigNode {
  enum class Kind { kNull, kScalar, kList, kMap };
  Kind kind = Kind::kNull;
  std::string text;        // scalars
  bool quoted = false;     // a quoted scalar is text, never a number, a bool or null
  std::vector<ConfigNode> items;
  std::vector<std::pair<std::string, ConfigNode>> members;  // in file order, keys unique
  std::vector<Origin> member_origins;                       // of the keys, parallel to members
  Origin origin = "default";

  const ConfigNode* find(const std::string& key) const;
};

/// Collects every problem of a recipe so that the user sees them all at once.
class Problems {
 public:
  void add(const Origin& origin, const std::string& path, const std::string& what, const std::string& hint = "");
  bool empty() const { return lines_.empty(); }
  size_t size() const { return lines_.size(); }
  /// Throws one UserError listing all problems, one line each as `file:line:column: key.path: what (hint)`; returns if none.
  void throw_if_any(const std::string& subject) const;

 private:
  std::vector<std::string> lines_;
};

/// Loads a recipe tree: the `defaults:` files it lists (relative to itself, recursively), the file itself, MORAINE_*
/// environment (MORAINE_TRAIN__STEPS=5 sets train.steps), then `key.sub=value` and `list.0.key=value` overrides. Then resolves `${key.path}`
/// and `${env:NAME}` in scalars. Rejects duplicate keys, merge keys, anchors used as merge, octal numbers (010) and cyclic references.
/// Reports into `problems`; throws UserError only if the file is missing or is not YAML.
ConfigNode load_config(const std::filesystem::path& recipe, std::span<const std::string> overrides, Problems& problems);

/// One resolved value for `validate`, `resolved.yaml` and reports.
struct ResolvedValue {
  std::string path;    // "train.steps"
  std::string value;   // as YAML text
  Origin origin;
};

namespace config_detail {

struct FieldInfo {
  std::string name, type, doc, default_text, unit;
  std::optional<double> min, max;
  bool min_exclusive = false;
  std::vector<std::string> choices;
  bool required = false;
};

bool parse_scalar(const ConfigNode& node, bool& out, std::string& why);
bool parse_scalar(const ConfigNode& node, int64_t& out, std::string& why);
bool parse_scalar(const ConfigNode& node, double& out, std::string& why);
bool parse_scalar(const ConfigNode& node, std::string& out, std::string& why);
std::string to_yaml(bool value);
std::string to_yaml(int64_t value);
std::string to_yaml(double value);
std::string to_yaml(const std::string& value);
bool in_range(double value, const FieldInfo& info, std::string& why);
Json range_schema(const FieldInfo& info);

template <typename T>
struct is_vector : std::false_type {};
template <typename T>
struct is_vector<std::vector<T>> : std::true_type {};
template <typename T>
struct is_optional : std::false_type {};
template <typename T>
struct is_optional<std::optional<T>> : std::true_type {};

}  // namespace config_detail

/// The field table of struct C. Supported member types: bool, int64_t, double, std::string, std::optional of these,
/// std::vector of these, nested structs (object), std::optional of a nested struct (optional_object) and std::vector of nested structs (list).
///
///   static const Schema<TrainConfig> schema = Schema<TrainConfig>()
///       .field("steps", &TrainConfig::steps).min(1).doc("Optimiser steps")
///       .field("optimizer", &TrainConfig::optimizer).choices({"adamw", "sgd"}).doc("...")
///       .object("schedule", &TrainConfig::schedule, schedule_schema()).doc("...")
///       .check([](const TrainConfig& c) -> std::optional<std::string> { ... });   // cross-field rule; text = the problem
template <typename C>
class Schema {
 public:
  template <typename T>
  Schema& field(std::string name, T C::*member);
  template <typename S>
  Schema& object(std::string name, S C::*member, const Schema<S>& schema);
  template <typename S>
  Schema& optional_object(std::string name, std::optional<S> C::*member, const Schema<S>& schema);
  template <typename S>
  Schema& list(std::string name, std::vector<S> C::*member, const Schema<S>& schema);

  // These refine the field added last.
  Schema& doc(std::string text);
  Schema& min(double value);            // inclusive; for vectors and optionals it bounds each element
  Schema& above(double value);          // exclusive
  Schema& max(double value);
  Schema& choices(std::vector<std::string> names);   // for strings and vectors of strings
  Schema& required();
  Schema& unit(std::string name);

  Schema& check(std::function<std::optional<std::string>(const C&)> rule);

  /// Fills `out` (already holding defaults) from a map node; unknown keys, wrong types and ranges go to `problems`.
  void parse(const ConfigNode& node, const std::string& path, C& out, Problems& problems) const;
  /// Every value with its origin, depth first, in table order.
  void resolve(const ConfigNode& node, const std::string& path, const C& value, std::vector<ResolvedValue>& out) const;
  /// The struct as JSON (all fields, canonical): what unit hashes are made of.
  Json to_json(const C& value) const;
  /// Reads back what to_json wrote. Throws UserError on a mismatch.
  C from_json(const Json& json) const;
  /// JSON schema (draft 2020-12) for editors.
  Json json_schema() const;
  /// Markdown table rows: key, type, default, range, doc; nested structs indented by path.
  std::string markdown(const std::string& path = "") const;

 private:
  struct Field;   // type-erased: info + parse/resolve/to_json/from_json/schema/markdown functions
  std::vector<std::shared_ptr<Field>> fields_;
  std::vector<std::function<std::optional<std::string>(const C&)>> checks_;
};

}  // namespace moraine::core

#include "core/config_schema.h"  // the templates' bodies
