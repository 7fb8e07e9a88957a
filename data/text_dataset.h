#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "data/byte_tokenizer.h"

namespace moraine::data {

/// Facts about one prepared domain file (docs/data.md).
struct TextDomainInfo {
  std::string name;       // domain name
  std::string tokenizer;  // "bytes-v1" or "hf:<sha256 of tokenizer.json>"
  int64_t vocab_size = 0;
  std::string fingerprint;  // SHA-256 over tokeniser, splits, tokens and document bounds
};

/// One split (train | validation | test) of a prepared domain: tokens streamed from HDF5 (memory is bounded, see
/// token_stream.h), packed into sequences of `seq_len` + 1 tokens; each overlaps the next by one token, so every token
/// but the split's first is predicted exactly once. Documents follow each other, each closed by its end-of-document
/// token; a tail shorter than a sequence is dropped from training and kept, padded with -1, for evaluation. Cheap to
/// copy (copies share file and cache). Thread-safe to read.
class TextDataset {
 public:
  /// Throws UserError if the file is missing, is not a text-domain file of a version this build reads, or was made with
  /// another tokeniser than `expected_tokenizer` (when not empty), and if seq_len < 1, there is no such split, the
  /// split holds fewer than seq_len + 1 tokens, its parts contradict each other, or the content is not what the
  /// fingerprint says (which reads the whole file, once per process).
  static TextDataset open(const std::filesystem::path& path, const std::string& split, int64_t seq_len,
                          const std::string& expected_tokenizer = "");

  const TextDomainInfo& info() const { return info_; }
  int64_t seq_len() const { return seq_len_; }
  int64_t num_tokens() const;
  int64_t num_sequences() const;       // full sequences, for training
  int64_t num_eval_sequences() const;  // with the padded tail
  /// UTF-8 bytes the split's predicted tokens stand for: the denominator of bits per byte. An end of document stands
  /// for none.
  int64_t num_bytes() const;

  /// Rows [first, first + count) of an endless pass over the split, row-major [count, seq_len + 1], every epoch in the
  /// order of its own Permutation. A pure function of its arguments, so resuming at a step needs no state. Throws as
  /// TokenStream::copy().
  std::vector<int64_t> training_rows(uint64_t seed, int64_t first, int64_t count) const;

  /// Training sequence `index` in file order, [seq_len + 1] tokens; 0 <= index < num_sequences().
  std::vector<int64_t> sequence(int64_t index) const;

  /// Evaluation sequences [first, first + count) in file order, row-major [count, seq_len + 1]; positions past the end
  /// are -1.
  std::vector<int64_t> eval_batch(int64_t first, int64_t count) const;
  /// Bytes that the predicted tokens of these evaluation sequences stand for. Sums to num_bytes() over all of them.
  int64_t eval_bytes(int64_t first, int64_t count) const;

 private:
  struct Split;
  TextDataset(TextDomainInfo info, int64_t seq_len, std::shared_ptr<const Split> split);

  TextDomainInfo info_;
  int64_t seq_len_;
  std::shared_ptr<const Split> split_;
};

}  // namespace moraine::data
