#pragma once

#include <cstdint>
#include <filesystem>
#include <random>
#include <string>
#include <vector>

#include "core/json.h"

// Ways to spoil a file, all pure in the state of a Random: a seed names a mutation for ever.
namespace moraine::fuzz {

/// Numbers from a seed, the same on every platform.
class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}

  /// In [0, bound); bound >= 1.
  size_t below(size_t bound) { return static_cast<size_t>(engine_() % bound); }
  bool once_in(size_t times) { return below(times) == 0; }
  template <typename T>
  const T& pick(const std::vector<T>& from) {
    return from[below(from.size())];
  }

 private:
  std::mt19937_64 engine_;
};

/// One to four edits of raw bytes: bits flipped, pieces deleted, inserted, doubled, swapped or zeroed, the end cut off.
std::string mutate_bytes(std::string bytes, Random& random);

/// One or two changes of a value somewhere in the document: extremes of numbers, other types, removed, renamed, doubled
/// and exchanged members, paths and other names instead of texts. Stays a JSON document.
core::Json mutate_json(core::Json document, Random& random);

/// Text of a document changed by mutate_json, of one that JSON cannot say (NaN, 1e999, text that is not UTF-8, keys
/// twice, thousands of lists inside each other), or of `text` with edited bytes. Works on JSON lines too.
std::string mutate_json_text(const std::string& text, Random& random);

/// A recipe with lines removed, doubled, exchanged, indented otherwise, values replaced (extremes, tags, anchors,
/// references, bytes that are not UTF-8), or edited bytes.
std::string mutate_yaml(const std::string& text, Random& random);

/// A safetensors file whose header was changed as JSON (offsets, shapes whose product overflows, types, metadata, the
/// JSON within the metadata), with a length that fits or does not, or edited bytes.
std::string mutate_safetensors(const std::string& file, Random& random);

/// Changes an HDF5 file in place through the library: attributes of other types and values, data sets of other types,
/// ranks and extents, missing ones, groups and links where data sets were; or edited bytes.
void mutate_hdf5(const std::filesystem::path& file, Random& random);

}  // namespace moraine::fuzz
