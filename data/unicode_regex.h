#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

struct URegularExpression;

namespace moraine::data {

/// A regular expression of a tokenizer.json, in the syntax of the library that Hugging Face's tokenizers use
/// (Oniguruma, Ruby), searched in UTF-8 text by ICU. Thread-safe.
class UnicodeRegex {
 public:
  /// Throws UserError naming what ICU would read otherwise than Oniguruma, or not at all: anchors, '.', word classes,
  /// back references, flags other than (?i:...), look-behind, counted quantifiers with a suffix, set operations.
  explicit UnicodeRegex(const std::string& pattern);
  /// Byte ranges [first, end) of the matches in valid UTF-8, in order; empty matches are left out. Throws UserError if
  /// the search needs too much memory or time.
  std::vector<std::pair<size_t, size_t>> matches(std::string_view text) const;

 private:
  struct Close {
    void operator()(URegularExpression* regex) const;
  };
  std::unique_ptr<URegularExpression, Close> compiled_;
};

/// Unicode's normalisation form C of valid UTF-8.
std::string to_nfc(std::string_view text);
/// The property White_Space.
bool is_white_space(char32_t code_point);

}  // namespace moraine::data
