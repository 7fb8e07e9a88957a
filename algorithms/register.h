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
  core::Json (*json_schema)();
  std::string (*markdown)();
};

/// All methods, sorted by name. One line per method in register.cpp.
const std::vector<MethodEntry>& methods();

/// The entry of that name. Throws UserError listing the methods.
const MethodEntry& find_method(const std::string& name);

/// Loads, resolves and parses a recipe. Throws one UserError that lists every problem.
ParsedRecipe load_recipe(const std::filesystem::path& path, const std::vector<std::string>& overrides);

}  // namespace moraine::algorithms
