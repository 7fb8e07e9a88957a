#include "coordinator/run_directory.h"

#include <algorithm>
#include <map>
#include <optional>
#include <set>

#include <fmt/ranges.h>

#include "core/error.h"
#include "core/log.h"

namespace moraine::coordinator {
namespace {

namespace fs = std::filesystem;

/// Leaves by key: {"train.steps": 100, "experts.0.rank": 4}.
void flatten(const core::Json& value, const std::string& key, std::map<std::string, std::string>& out) {
  if (value.is_structured() && !value.empty()) {
    for (const auto& [name, member] : value.items()) flatten(member, key.empty() ? name : key + "." + name, out);
  } else {
    out[key] = value.dump();
  }
}

bool is_left_over(const fs::path& file) {
  const std::string name = file.filename().string();
  return name.starts_with('.') && name.ends_with(".tmp");
}

/// write_atomically() leaves its temporary file behind when the process is killed.
void remove_left_overs(const fs::path& directory) {
  if (!fs::is_directory(directory)) return;
  std::vector<fs::path> found;
  for (const auto& entry : fs::recursive_directory_iterator(directory)) {
    if (is_left_over(entry.path())) found.push_back(entry.path());
  }
  for (const fs::path& file : found) fs::remove(file);
}

void refuse_foreign_directory(const fs::path& root) {
  if (!fs::is_directory(root)) {
    throw core::UserError(fmt::format("coordinator: {} is no directory", root.string()),
                          "name a directory with --run-dir");
  }
  static const std::set<std::string> ours = {"recipe.yaml", "resolved.yaml", "recipe.json", "lock"};
  for (const auto& entry : fs::directory_iterator(root)) {
    if (ours.contains(entry.path().filename().string()) || is_left_over(entry.path())) continue;
    throw core::UserError(fmt::format("coordinator: {} is no run directory and not empty (it holds {})", root.string(),
                                      entry.path().filename().string()),
                          "name an empty or a new directory with --run-dir");
  }
}

core::FileLock lock_or_explain(const RunLayout& layout) {
  std::error_code failed;  // said here: the lock file's own message would be that there is no such file
  fs::create_directories(layout.root, failed);
  if (failed) {
    throw core::IoError(
        fmt::format("coordinator: cannot make run directory {}: {}", layout.root.string(), failed.message()),
        "name a directory you can write to with --run-dir");
  }
  if (auto lock = core::FileLock::try_lock(layout.lock())) return std::move(*lock);
  std::string holder = core::read_text(layout.lock());
  std::replace(holder.begin(), holder.end(), '\n', ' ');
  throw core::UserError(
      fmt::format("coordinator: run directory {} is in use by process (pid host): {}", layout.root.string(), holder),
      "wait for that run, stop it, or use another --run-dir");
}

/// What makes the recorded recipe what it is; nullopt, with a warning, when it cannot be read. Nothing is lost then:
/// units are told apart by ids that hold what determines them, and the recipe at hand is written in its place.
std::optional<core::Json> recorded_identity(const RunLayout& layout, const Recipe& recipe) {
  try {
    const core::Json values = core::read_json(layout.recipe_json());
    if (values.is_object()) return recipe.identity(values);
    core::log::warn("recipe.json is damaged and written anew: path={}", layout.recipe_json().string());
  } catch (const core::IoError&) {
    throw;
  } catch (const std::exception& error) {
    core::log::warn("recipe.json is damaged and written anew: reason={}", error.what());
  }
  return std::nullopt;
}

void check_identity(const RunLayout& layout, const Recipe& recipe, bool accept_changes) {
  const auto recorded = recorded_identity(layout, recipe);
  if (!recorded) return;
  const auto changes = recipe_changes(*recorded, recipe.identity(recipe.values));
  if (changes.empty()) return;
  if (!accept_changes) {
    throw core::UserError(
        fmt::format("coordinator: run directory {} was made from another recipe:\n  {}", layout.root.string(),
                    fmt::join(changes, "\n  ")),
        "use another --run-dir, or --accept-changes to keep the directory: units that did not change are reused");
  }
  for (const std::string& change : changes) core::log::info("recipe changed: {}", change);
}

}  // namespace

std::vector<std::string> recipe_changes(const core::Json& before, const core::Json& after) {
  std::map<std::string, std::string> old_values, new_values;
  flatten(before, "", old_values);
  flatten(after, "", new_values);
  std::set<std::string> keys;
  for (const auto* values : {&old_values, &new_values}) {
    for (const auto& [key, value] : *values) keys.insert(key);
  }
  const auto value_of = [](const std::map<std::string, std::string>& values, const std::string& key) {
    const auto found = values.find(key);
    return found == values.end() ? std::string("(absent)") : found->second;
  };
  std::vector<std::string> changes;
  for (const std::string& key : keys) {
    const std::string was = value_of(old_values, key), is = value_of(new_values, key);
    if (was != is) changes.push_back(fmt::format("{}: {} -> {}", key, was, is));
  }
  return changes;
}

RunDirectory RunDirectory::open(const fs::path& root, const Recipe& recipe, bool accept_changes) {
  const RunLayout layout{root};
  try {
    const bool known = fs::exists(layout.recipe_json());
    if (!known && fs::exists(root)) refuse_foreign_directory(root);
    core::FileLock lock = lock_or_explain(layout);
    if (known) check_identity(layout, recipe, accept_changes);
    remove_left_overs(layout.artefacts());
    remove_left_overs(root / "checkpoints");
    core::write_atomically(layout.recipe_yaml(), recipe.text);
    core::write_atomically(layout.resolved_yaml(), recipe.resolved);
    core::write_atomically(layout.recipe_json(), recipe.values.dump(2) + "\n");  // last: it makes this a run directory
    return {layout, std::move(lock)};
  } catch (const fs::filesystem_error& error) {
    throw core::IoError(
        fmt::format("coordinator: cannot use run directory {}: {}", root.string(), error.code().message()),
        "check the path and its permissions");
  }
}

}  // namespace moraine::coordinator
