#pragma once

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "core/file.h"
#include "core/json.h"

namespace moraine::coordinator {

/// Where things are in a run directory (docs/recovery.md). Only names; nothing is opened.
struct RunLayout {
  std::filesystem::path root;

  std::filesystem::path recipe_yaml() const { return root / "recipe.yaml"; }      // as given
  std::filesystem::path resolved_yaml() const { return root / "resolved.yaml"; }  // every value with its origin
  std::filesystem::path recipe_json() const { return root / "recipe.json"; }      // every value; the run's identity
  std::filesystem::path journal() const { return root / "journal" / "000001.log"; }
  std::filesystem::path artefacts() const { return root / "artefacts"; }
  std::filesystem::path metrics() const { return root / "metrics.jsonl"; }
  std::filesystem::path tensorboard() const { return root / "tensorboard"; }
  std::filesystem::path lock() const { return root / "lock"; }
};

/// What a run directory belongs to.
struct Recipe {
  std::string text;      // the file as given
  std::string resolved;  // YAML with the origin of every value
  core::Json values;     // every resolved value, Schema::to_json
  /// Of such values what makes it this recipe and no other (core::Schema::identity).
  std::function<core::Json(const core::Json& values)> identity = [](const core::Json& all) { return all; };
};

/// The keys that differ, one line each: "train.steps: 100 -> 200".
std::vector<std::string> recipe_changes(const core::Json& before, const core::Json& after);

/// A run directory held for writing: made or found, locked against other processes while the object lives.
class RunDirectory {
 public:
  /// Throws UserError if another process uses it (with its pid and host), if it belongs to another recipe and
  /// `accept_changes` is not set (the message lists the keys), or if it is some other non-empty directory; IoError if
  /// it cannot be written. With `accept_changes` the new recipe is stored and every unit whose id did not change is
  /// reused.
  static RunDirectory open(const std::filesystem::path& root, const Recipe& recipe, bool accept_changes);

  const RunLayout& layout() const { return layout_; }

 private:
  RunDirectory(RunLayout layout, core::FileLock lock) : layout_(std::move(layout)), lock_(std::move(lock)) {}

  RunLayout layout_;
  core::FileLock lock_;
};

}  // namespace moraine::coordinator
