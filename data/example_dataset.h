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
  std::string fingerprint;               // SHA-256 over task, classes, tokeniser, splits and all their values
};

/// One tokenised example. Special tokens are part of `tokens`.
struct Example {
  std::vector<int64_t> tokens;
  int64_t prompt = 0;  // the first so many tokens are given, the rest is to be predicted; classification: all are given
  int64_t label = -1;  // classification: the class; choice: 1 for the right one, else 0; completion: -1
  int64_t group = -1;  // choice: the question it belongs to (0, 1, ... in file order); else -1
  int64_t bytes = 0;   // UTF-8 bytes of the predicted text (completion, choice)
};

/// One split (train | validation | test) of a prepared set of examples. Tokens are streamed from HDF5 (memory is
/// bounded, see token_stream.h); 40 bytes per example stay in memory. Cheap to copy (copies share file and cache).
/// Thread-safe to read.
class ExampleDataset {
 public:
  /// Throws UserError if the file is missing, is not a file of examples of a version this build reads, or was made with
  /// another tokeniser than `expected_tokenizer` (when not empty), and if there is no such split, it holds no example,
  /// its parts contradict each other or the task, a token is outside the vocabulary, or the content is not what the
  /// fingerprint says (which reads the whole file, once per process).
  static ExampleDataset open(const std::filesystem::path& path, const std::string& split,
                             const std::string& expected_tokenizer = "");

  const ExampleSetInfo& info() const { return info_; }
  int64_t size() const;    // examples; choice: all choices
  int64_t groups() const;  // choice: questions; else size()
  /// Choice: [first, end) of the examples of question `index`; else [index, index + 1). 0 <= index < groups().
  std::pair<int64_t, int64_t> group(int64_t index) const;
  /// Tokens of an example; 0 <= index < size(), as below.
  int64_t length(int64_t index) const;
  /// Throws as TokenStream::copy().
  Example at(int64_t index) const;
  std::vector<int64_t> labels() const;  // of all examples

 private:
  struct Split;
  ExampleDataset(ExampleSetInfo info, std::shared_ptr<const Split> split);

  ExampleSetInfo info_;
  std::shared_ptr<const Split> split_;
};

}  // namespace moraine::data
