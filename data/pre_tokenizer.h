#pragma once

#include <string_view>
#include <variant>
#include <vector>

#include "data/unicode_regex.h"

namespace moraine::data {

/// Every number (category N) a piece of its own, or every run of them.
struct DigitSplit {
  bool individual = false;
  std::vector<std::string_view> operator()(std::string_view text) const;
};

/// Matches of an expression, and what lies between them, become pieces; or only one of the two.
struct RegexSplit {
  UnicodeRegex regex;
  bool keep_matches = true, keep_rest = true;
  std::vector<std::string_view> operator()(std::string_view text) const;
};

/// One step of a tokenizer.json's pre_tokenizer, from one piece of UTF-8 text to smaller ones.
using PreTokenizer = std::variant<DigitSplit, RegexSplit>;

/// All steps, one after the other. Pieces point into `text`; none is empty.
std::vector<std::string_view> pre_tokenize(const std::vector<PreTokenizer>& steps, std::string_view text);

}  // namespace moraine::data
