#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace moraine::data {

/// The built-in byte tokeniser: token = byte value 0..255, 256 = end of document. Vocabulary 257, padded by models as they like.
struct ByteTokenizer {
  static constexpr int64_t kEndOfDocument = 256;
  static constexpr int64_t kVocabSize = 257;
  static constexpr const char* kName = "bytes-v1";
  static std::vector<int64_t> encode(std::string_view text);
  static std::string decode(const std::vector<int64_t>& tokens);
};

/// Facts about one prepared domain file (docs/formats.md, "text-domain HDF5").
struct TextDomainInfo {
  std::string name;          // domain name
  std::string tokenizer;     // "bytes-v1" or "hf:<sha256 of tokenizer.json>"
  int64_t vocab_size = 0;
  std::string fingerprint;   // SHA-256 over tokeniser, splits, tokens and document bounds
};

/// One split (train | validation | test) of a prepared domain: tokens streamed from HDF5, packed into sequences of
/// `seq_len` + 1 tokens (each sequence overlaps the next by one token, so every token is predicted once).
/// Documents are joined by the end-of-document token; a tail shorter than a sequence is dropped from training and kept, padded with -1
/// targets, for evaluation. Thread-safe to read.
class TextDataset {
 public:
  /// Throws UserError if the file is missing, is not a text-domain file, was made with another tokeniser than
  /// `expected_tokenizer` (non-empty), has no such split, or the split holds fewer than seq_len + 1 tokens.
  static TextDataset open(const std::filesystem::path& path, const std::string& split, int64_t seq_len,
                          const std::string& expected_tokenizer = "");

  const TextDomainInfo& info() const { return info_; }
  int64_t num_tokens() const;
  int64_t num_sequences() const;        // full sequences, for training
  int64_t num_eval_sequences() const;   // with the padded tail
  /// UTF-8 bytes the split's predicted tokens stand for: the denominator of bits per byte.
  int64_t num_bytes() const;

  /// Rows of a training batch: sequence indices in the shuffled order of their epoch. A pure function of (seed, step, batch_size),
  /// so resuming at a step needs no state. Row-major [batch_size, seq_len + 1].
  std::vector<int64_t> training_batch(uint64_t seed, int64_t step, int64_t batch_size) const;

  /// Evaluation sequences [first, first + count) in file order, row-major [count, seq_len + 1]; positions past the end are -1.
  std::vector<int64_t> eval_batch(int64_t first, int64_t count) const;
  /// Bytes that the predicted tokens of these evaluation sequences stand for.
  int64_t eval_bytes(int64_t first, int64_t count) const;

  int64_t seq_len() const { return seq_len_; }

 private:
  TextDomainInfo info_;
  int64_t seq_len_ = 0;
  std::vector<int32_t> tokens_;        // of this split; streamed in blocks when opened
  std::vector<int64_t> byte_offsets_;  // cumulative bytes before each token; empty for byte tokens (one each, 0 for end of document)
};

}  // namespace moraine::data
