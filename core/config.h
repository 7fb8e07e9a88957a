#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/json.h"

// YAML -> plain struct, once, at start-up. The only place that reads YAML. A struct's default member initialisers are
// its defaults; one Schema per struct drives parsing, range checks, `validate`, `--help`, the JSON schema and the docs.
//
//   Problems problems;
//   const ConfigNode node = load_config("recipe.yaml", overrides, problems);
//   Recipe recipe;
//   recipe_schema().parse(node, "", recipe, problems);
//   problems.throw_if_any("recipe.yaml");
namespace moraine::core {

/// Where a value came from: "recipe.yaml:12:3", "environment MORAINE_SEED", "command line", "default".
using Origin = std::string;

/// A YAML value with the place it came from. Scalars keep their text; typing happens against a Schema.
struct ConfigNode {
  enum class Kind { kNull, kScalar, kList, kMap };
  Kind kind = Kind::kNull;
  std::string text = {};                 // scalars
  bool quoted = false;                   // a quoted scalar is text, never a number, a bool or null
  std::filesystem::path directory = {};  // of the file it stands in; empty = the working directory
  bool broken = false;                   // a problem was reported for it already: nobody complains again
  std::vector<ConfigNode> items = {};
  std::vector<std::pair<std::string, ConfigNode>> members = {};  // in file order, keys unique
  std::vector<Origin> member_origins = {};                       // of the keys, parallel to members
  Origin origin = "default";

  const ConfigNode* find(const std::string& key) const;
};

/// Collects every problem of a recipe so that the user sees them all at once.
class Problems {
 public:
  void add(const Origin& origin, const std::string& path, const std::string& what, const std::string& hint = "");
  bool empty() const { return lines_.empty(); }
  size_t size() const { return lines_.size(); }
  /// Throws one UserError listing all problems, one line each as `file:line:column: key.path: what (hint)`; returns if
  /// none.
  void throw_if_any(const std::string& subject) const;

 private:
  std::vector<std::string> lines_;
};

/// Loads a recipe tree: the `defaults:` files it lists (relative to itself, recursively), the file itself, MORAINE_*
/// environment (MORAINE_TRAIN__STEPS=5 sets train.steps; empty = not set), then `key.sub=value` and `list.0.key=value`
/// overrides, whose values are read as YAML. Maps are merged key by key, anything else is replaced.
/// Then resolves `${key.path}` and `${env:NAME}` in scalars: a scalar that is one reference takes the value as it is,
/// number, list or map; inside longer text only scalars can stand; `$${` is a literal `${`. Rejects duplicate keys,
/// merge keys, aliases, tags and cyclic references. MORAINE_BENCH, BUILD_DIR, CMAKE_FLAGS, FAULT, KERNEL_BENCH, LOG,
/// MACHINE, NCCL_DIR, PYTHON, RESULTS, SKIP_APT, THREADS, TORCH_DIR, WORKERS_PER_NODE and MORAINE_TEST_* are not recipe
/// keys and are ignored here. Reports into `problems`; throws UserError only if the file is missing or is not YAML.
ConfigNode load_config(const std::filesystem::path& recipe, std::span<const std::string> overrides, Problems& problems);

/// One resolved value for `validate`, `resolved.yaml` and reports.
struct ResolvedValue {
  std::string path;   // "train.steps", "domains.0.name"
  std::string value;  // as YAML text
  Origin origin;
};

/// The values as one nested YAML document with each origin as a comment; load_config reads it back to the same values.
std::string resolved_yaml(std::span<const ResolvedValue> values);

}  // namespace moraine::core

#include "core/config_table.h"  // field tables without their C++ types

namespace moraine::core {

/// The field table of struct C. Supported member types: bool, int64_t, uint64_t, double, std::string, Json (any value,
/// kept as it is), std::optional of these, std::vector of these, nested structs (object), std::optional of a nested
/// struct (optional_object), std::vector of nested structs (list) and std::map of them by name (map).
///
///   static const Schema<TrainConfig> schema = Schema<TrainConfig>()
///       .field("steps", &TrainConfig::steps).min(1).doc("Optimiser steps")
///       .field("optimizer", &TrainConfig::optimizer).choices({"adamw", "sgd"}).doc("...")
///       .object("schedule", &TrainConfig::schedule, schedule_schema()).doc("...")
///       .check([](const TrainConfig& c) -> std::optional<std::string> { ... });  // the problem as text
///
/// Numbers are decimal: 010, 0x10, 1e5 for an integer, nan and inf are refused with what to write instead. Booleans are
/// true and false. Thread-safe once built.
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
  template <typename S>
  Schema& map(std::string name, std::map<std::string, S> C::*member, const Schema<S>& schema);

  // These refine the field added last.
  Schema& doc(std::string text) {
    last().doc = std::move(text);
    return *this;
  }
  /// Inclusive; for vectors and optionals it bounds each element.
  Schema& min(double value) {
    last().min = value;
    return *this;
  }
  /// Exclusive.
  Schema& above(double value) {
    last().min_exclusive = true;
    return min(value);
  }
  Schema& max(double value) {
    last().max = value;
    return *this;
  }
  /// For strings and vectors of strings.
  Schema& choices(std::vector<std::string> names) {
    last().choices = std::move(names);
    return *this;
  }
  Schema& required() {
    last().required = true;
    return *this;
  }
  Schema& unit(std::string name) {
    last().unit = std::move(name);
    return *this;
  }
  /// Text that names a file or directory: a relative one starts at the directory of the recipe file it stands in, or at
  /// the working directory when it comes from the command line or the environment. Empty text stays empty.
  Schema& path() {
    last().is_path = true;
    return *this;
  }
  /// For lists of scalars: an item that stands twice is a problem.
  Schema& unique() {
    last().unique = true;
    return *this;
  }
  /// The field joined when runs had been recorded without it: to_json() leaves it out while it has its default, and
  /// from_json() takes the default where it is missing. So a new key neither breaks older runs nor changes their units'
  /// ids. Every field added to a schema that runs or units are recorded with needs it.
  Schema& joined_later() {
    last().joined_later = true;
    return *this;
  }
  /// The field changes what is measured or drawn, never what is trained, merged or exported. Its documentation says so.
  Schema& evaluation_only() {
    last().effect = config_detail::Effect::kEvaluation;
    return *this;
  }
  /// The field never changes a result: it is no part of identity(). Its documentation says so.
  Schema& changes_nothing() {
    last().effect = config_detail::Effect::kNothing;
    return *this;
  }

  /// Adds a cross-field rule, run when the struct's own fields are free of problems.
  Schema& check(std::function<std::optional<std::string>(const C&)> rule) {
    checks_.push_back(std::move(rule));
    return *this;
  }

  /// Fills `out` (already holding defaults) from a map node; unknown keys, wrong types and ranges go to `problems`.
  void parse(const ConfigNode& node, const std::string& path, C& out, Problems& problems) const;
  /// Every value with its origin, depth first, in table order. A list of scalars is one value.
  void resolve(const ConfigNode& node, const std::string& path, const C& value, std::vector<ResolvedValue>& out) const {
    config_detail::resolve(table_, &node, path, write(value, true), out);
  }
  /// The struct as JSON, canonical: what unit hashes are made of. All fields but those that joined later and have their
  /// default.
  Json to_json(const C& value) const { return write(value, false); }
  /// Reads back what to_json wrote. Throws UserError naming every missing, unknown or ill-typed key of `what`.
  C from_json(const Json& json, const std::string& what = "stored configuration") const;
  /// What determines results, of what to_json wrote: without fields that never change one, and without paths, whose
  /// files count by content.
  Json identity(const Json& json) const { return config_detail::identity(table_, json); }
  /// JSON schema (draft 2020-12) for editors.
  Json json_schema() const { return config_detail::json_schema(table_, true); }
  /// Markdown table rows: key, type, default, range, doc; nested structs by path.
  std::string markdown(const std::string& path = "") const { return config_detail::markdown(table_, path); }

 private:
  template <typename>
  friend class Schema;

  // How one field of the table reaches its member.
  struct Member {
    std::function<void(const config_detail::FieldInfo&, const ConfigNode&, const std::string& path, C&, Problems&)>
        parse;
    std::function<Json(const C&, bool complete)> get;
  };
  Json write(const C& value, bool complete) const;
  Schema& add(config_detail::FieldInfo info, Member member);
  config_detail::FieldInfo& last();

  config_detail::Table table_;
  std::vector<Member> members_;  // parallel to table_
  std::vector<std::function<std::optional<std::string>(const C&)>> checks_;
};

/// A unit's specification: written by plan() from a struct, read by execute() into the same struct, so that what runs
/// is what was planned and hashed, whatever the worker's own recipe says.
template <typename C>
Json to_spec(const Schema<C>& schema, const C& value) {
  return schema.to_json(value);
}
/// Throws UserError naming the keys when the specification was written by another version.
template <typename C>
C from_spec(const Schema<C>& schema, const Json& spec) {
  return schema.from_json(spec, "unit specification");
}

}  // namespace moraine::core

#include "core/config_schema.h"  // the templates' bodies
