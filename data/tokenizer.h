#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace moraine::data {

/// Whether text that spells a special token ("<|endoftext|>") is that token. User text of unknown origin should not be.
enum class SpecialTokens { kRecognised, kText };

/// Text to token ids and back. Thread-safe.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;
  /// Tokens of the text alone, without prefix(). Throws UserError if the text cannot be written in these tokens.
  virtual std::vector<int64_t> encode(std::string_view text, SpecialTokens special) const = 0;
  /// The bytes that tokens stand for; a sequence cut anywhere may end within a character. Special tokens appear as
  /// they are spelt, or not at all if `skip_special`. An id without a token (models pad their vocabulary) appears as
  /// U+FFFD.
  virtual std::string decode(std::span<const int64_t> tokens, bool skip_special) const = 0;
  /// What the tokeniser's authors put in front of every text (a beginning-of-text token), often nothing.
  virtual std::vector<int64_t> prefix() const { return {}; }
  /// The token that ends every text, where the tokeniser itself says so.
  virtual std::optional<int64_t> end_of_text() const { return std::nullopt; }
  /// One more than the largest id.
  virtual int64_t vocab_size() const = 0;
};

}  // namespace moraine::data
