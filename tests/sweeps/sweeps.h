#pragma once

#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace moraine::algorithms {

using Overrides = std::vector<std::string>;

/// How a key is changed, where its type does not say it all.
struct Change {
  Overrides context = {};   // of both recipes: what must hold for the key to matter
  Overrides change = {};    // empty = another value by the key's type
  Overrides moved = {};     // for paths: the same bytes elsewhere
  bool refused = false;     // the method has no use for it and says so
  bool configured = false;  // it stands in the configuration that is exported beside the artefact
  bool elsewhere = false;   // another recipe of the method is for it
  bool only_drawn = false;  // of keys that are for evaluation only: no unit knows them, tables do
};

/// One recipe of a method. Keys of list items are those of the first: "domains.0.name".
struct Sweep {
  std::string method, recipe;
  std::map<std::string, Change> changes;
  std::set<std::string> only;  // not empty: the keys that this recipe is for
};

/// The recipes of every method, over the files of prepared_files.h; a file per method.
class Sweeps {
 public:
  explicit Sweeps(std::filesystem::path files) : files_(std::move(files)) {}
  std::vector<Sweep> of(const std::string& method) const {
    if (method == "flexmore") return flexmore();
    if (method == "continual") return continual();
    if (method == "finetune") return finetune();
    return federated(method);
  }

 private:
  std::string file(const std::string& name) const { return (files_ / name).string(); }
  // A path key: the same bytes elsewhere, and other bytes.
  Change path_change(const std::string& key, const std::string& now, const std::string& other,
                     const Overrides& context = {}) const {
    return {.context = context, .change = {key + "=" + file(other)}, .moved = {key + "=" + file("copies/" + now)}};
  }
  // Keys of an adapter whose rank_pattern names query and whose alpha_pattern names value.
  static void change_adapter(const std::string& at, std::map<std::string, Change>& changes);
  std::vector<Sweep> flexmore() const;
  std::vector<Sweep> federated(const std::string& method) const;
  std::vector<Sweep> continual() const;
  std::vector<Sweep> finetune() const;

  std::filesystem::path files_;
};

}  // namespace moraine::algorithms
