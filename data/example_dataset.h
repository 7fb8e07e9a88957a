#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace moraine::data {

/// Facts about one prepared file of examples (docs/data.md).
struct ExampleSetInfo {
  std::string name;
  std::string tokenizer;  // "bytes-v1" or "hf:<sha256 of tokenizer.json>"
  int64_t vocab_size = 0;
  std::string task;                      // "classification" | "completion" | "choice"
  std::vector<std::string> class_names;  // classification: by label; else empty
  std::string fingerprint;               // SHA-256 over task, tokeniser, classes and all splits
};

/// One example. The first `prompt` tokens are given, the others are to be predicted; of a classification all are given.
struct Example {
  std::vector<int64_t> tokens = {};  // special tokens included
  int64_t prompt = 0;
  int64_t label = -1;  // classification: the class; choice: 1 for the right one, else 0; completion: -1
  int64_t group = -1;  // choice: the question, 0, 1, ... in file order; else -1
  int64_t bytes = 0;   // UTF-8 bytes of what is to be predicted
};

/// One split (train | validation | test) of a prepared set of examples; tokens are read from HDF5 when asked for
/// (token_stream.h). Cheap to copy (copies share file and cache). Thread-safe to read.
class ExampleDataset {
 public:
  /// Throws UserError if the file is missing, is not a file of examples of a version this build reads, or was made with
  /// another tokeniser than `expected_tokenizer` (when not empty), and if there is no such split, its parts contradict
  /// each other, or the content is not what the fingerprint says (which reads the whole file, once per process).
  static ExampleDataset open(const std::filesystem::path& path, const std::string& split,
                             const std::string& expected_tokenizer = "");

  const ExampleSetInfo& info() const;
  int64_t size() const;    // examples; choice: choices of all questions
  int64_t groups() const;  // choice: questions; else size()
  /// Examples [first, end) of a question; else [index, index + 1).
  std::pair<int64_t, int64_t> group(int64_t index) const;
  int64_t length(int64_t index) const;  // tokens
  /// Throws as TokenStream::copy().
  Example at(int64_t index) const;
  const std::vector<int64_t>& labels() const;  // of all examples

 private:
  struct Split;
  explicit ExampleDataset(std::shared_ptr<const Split> split);
  std::shared_ptr<const Split> split_;
};

}  // namespace moraine::data
