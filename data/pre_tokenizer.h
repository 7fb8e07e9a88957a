#pragma once

#include <string_view>
#include <vector>

#include "data/unicode_regex.h"

namespace moraine::data {

/// One step of a tokenizer.json's pre_tokenizer, from a piece of UTF-8 text to smaller ones: matches of an expression,
/// and what lies between them, become pieces; or only one of the two.
struct RegexSplit {
  UnicodeRegex regex;
  bool keep_matches = true, keep_rest = true;
  std::vector<std::string_view> operator()(std::string_view text) const;
};

/// Every number (category N, as Rust's char::is_numeric) a piece of its own, or every run of them.
RegexSplit digit_split(bool individual);

/// All steps, one after the other. Pieces point into `text`; none is empty.
std::vector<std::string_view> pre_tokenize(const std::vector<RegexSplit>& steps, std::string_view text);

}  // namespace moraine::data
