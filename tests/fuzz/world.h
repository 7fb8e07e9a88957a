#pragma once

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "tests/fuzz/mutators.h"
#include "tests/temporary_directory.h"

namespace moraine::fuzz {

/// Whole files to spoil: prepared text and images, three small finished runs, and what is made of them.
class World {
 public:
  /// Made once in a process; takes some seconds. Needs the Python environment that scripts/setup makes.
  static const World& get();

  const std::filesystem::path& path() const { return directory_.path(); }
  std::filesystem::path operator/(const std::string& name) const { return directory_ / name; }

  // text/{public,left,right}.h5, text/recipe.yaml    images/{images,others}.h5, images/recipe.yaml
  // federated.yaml, merge.yaml
  // runs/{flexmore,federated,continual}
  // base/ (dense), mixture/, sharded/, encoder/, lora/ (PEFT)
  // expert.safetensors, adapter.safetensors

 private:
  World();
  TemporaryDirectory directory_;
};

/// A copy of files of the world, of which one at a time is spoilt.
class Scratch {
 public:
  /// Copies these files and directories of the world, side by side under their own names.
  explicit Scratch(const std::vector<std::string>& names);

  std::filesystem::path operator/(const std::string& name) const { return directory_ / name; }
  /// A path that nothing stands at, for what a command makes.
  std::filesystem::path out();
  /// Spoils a file by its name: JSON, JSON lines, YAML, safetensors, HDF5, anything else by its bytes.
  void spoil(const std::string& name, Random& random) const;
  /// Puts the file back as it was.
  void mend(const std::string& name) const;

 private:
  TemporaryDirectory directory_;
  std::vector<std::string> names_;
};

}  // namespace moraine::fuzz
