#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "core/json.h"

namespace moraine::models {

/// Reads the keys of one Hugging Face config.json, remembers which were read and collects what is wrong with them as
/// sentences that begin with the key. A null value counts as absent. Keeps references: both arguments must outlive it.
class ConfigKeys {
 public:
  ConfigKeys(const core::Json& json, std::vector<std::string>& problems) : json_(json), problems_(problems) {}

  /// nullptr when absent or null.
  const core::Json* find(const std::string& key);
  /// Null counts as present.
  bool contains(const std::string& key) const { return json_.contains(key); }
  core::Json any(const std::string& key);
  /// Without a value for `absent` the key is required.
  int64_t integer(const std::string& key, std::optional<int64_t> absent);
  double number(const std::string& key, double absent);
  bool boolean(const std::string& key, bool absent);
  std::vector<int64_t> integers(const std::string& key);
  /// An option that changes the mathematics and is not implemented: absent, null or `neutral`, else a problem.
  void only(const std::string& key, const core::Json& neutral);
  /// Any other problem.
  void wrong(std::string what) { problems_.push_back(std::move(what)); }
  /// Keys that nobody read are problems: they may change the model. Exempt are `irrelevant` ones, those that start with
  /// '_' (transformers' own notes), null values, what config.json files carry for other purposes (labels, notes of
  /// tools, what `generate` reads) and options that are written out although they are off.
  void refuse_unread(const std::vector<std::string>& irrelevant);

 private:
  const core::Json& json_;
  std::vector<std::string>& problems_;
  std::set<std::string> seen_;
};

/// What is wrong with sizes that no model has, whatever a config says: more than 100,000 layers, a side above 2^31,
/// more than 2^53 parameters (`parameters`, counted in floating point, which does not wrap). Below these bounds
/// closed-form counts in 64 bits are exact.
std::optional<std::string> implausible_sizes(int64_t layers, std::initializer_list<int64_t> sides, double parameters);

}  // namespace moraine::models
