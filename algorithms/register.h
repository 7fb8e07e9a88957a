#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "algorithms/method.h"
#include "algorithms/run_config.h"
#include "core/config.h"

namespace moraine::algorithms {

/// A recipe after parsing: the common part, the method ready to plan, and every value with its origin.
struct ParsedRecipe {
  RunConfig run;
  std::unique_ptr<Method> method;
  std::vector<core::ResolvedValue> resolved;
  core::Json values;  // all values, canonical
};

/// One method of the registry.
struct MethodEntry {
  std::string name;
  std::string summary;  // one line for --help
  /// Types and checks the tree; problems are collected, not thrown.
  ParsedRecipe (*parse)(const core::ConfigNode& root, core::Problems& problems);
  /// The method of a recorded run: `values` as ParsedRecipe::values, `inputs` as Method::inputs(). Opens no file.
  std::unique_ptr<Method> (*restore)(const core::Json& values, const core::Json& inputs);
  /// Of ParsedRecipe::values what determines results: core::Schema::identity of the method's own table.
  core::Json (*identity)(const core::Json& values);
  core::Json (*json_schema)();
  std::string (*markdown)();
};

/// All methods, sorted by name. One line per method in register.cpp.
const std::vector<MethodEntry>& methods();

/// The entry of that name. Throws UserError listing the methods.
const MethodEntry& find_method(const std::string& name);

/// SHA-256 of what determines a run's results: method, identity keys and inputs (fingerprints of data, model).
/// Processes that work on one run must agree on it. Needs Method::open_inputs().
std::string recipe_identity(const ParsedRecipe& recipe);

/// The method of a recorded run: `values` as ParsedRecipe::values, `inputs` as Method::inputs(), `origin` names the
/// files for messages. Opens no file. Throws UserError if they are not what a run of this version records.
std::unique_ptr<Method> restore_method(const core::Json& values, const core::Json& inputs, const std::string& origin);

/// Loads, resolves and parses a recipe; `native` arithmetic gets this machine's name. Throws one UserError that lists
/// every problem.
ParsedRecipe load_recipe(const std::filesystem::path& path, const std::vector<std::string>& overrides);

}  // namespace moraine::algorithms
