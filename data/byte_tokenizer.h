#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "data/tokenizer.h"

namespace moraine::data {

/// The built-in byte tokeniser: token = byte value 0..255, 256 = end of document. Vocabulary 257, padded by models as
/// they like.
class ByteTokenizer final : public Tokenizer {
 public:
  static constexpr int64_t kEndOfDocument = 256;
  static constexpr int64_t kVocabSize = 257;
  static constexpr const char* kName = "bytes-v1";
  /// One token per byte; no end of document is added.
  static std::vector<int64_t> encode(std::string_view text);
  /// The inverse of encode(). An end of document stands for no text. Throws UserError on any other token outside
  /// 0..255.
  static std::string decode(const std::vector<int64_t>& tokens);

  /// No text spells the end of a document.
  std::vector<int64_t> encode(std::string_view text, SpecialTokens) const override { return encode(text); }
  std::string decode(std::span<const int64_t> tokens, bool skip_special) const override;
  std::optional<int64_t> end_of_text() const override { return kEndOfDocument; }
  int64_t vocab_size() const override { return kVocabSize; }
};

}  // namespace moraine::data
