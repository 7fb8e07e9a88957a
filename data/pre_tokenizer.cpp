#include "data/pre_tokenizer.h"

#include "core/utf8.h"

namespace moraine::data {

std::vector<std::string_view> DigitSplit::operator()(std::string_view text) const {
  std::vector<std::string_view> pieces;
  size_t first = 0;
  bool in_number = false;
  for (size_t at = 0; at < text.size();) {
    const size_t begin = at;
    const bool number = is_number(core::next_code_point(text, at));
    if (begin > first && (number != in_number || (number && individual))) {
      pieces.push_back(text.substr(first, begin - first));
      first = begin;
    }
    in_number = number;
  }
  if (first < text.size()) pieces.push_back(text.substr(first));
  return pieces;
}

std::vector<std::string_view> RegexSplit::operator()(std::string_view text) const {
  std::vector<std::string_view> pieces;
  const auto rest = [&](size_t first, size_t end) {
    if (keep_rest && first < end) pieces.push_back(text.substr(first, end - first));
  };
  size_t done = 0;
  for (const auto& [first, end] : regex.matches(text)) {
    rest(done, first);
    if (keep_matches) pieces.push_back(text.substr(first, end - first));
    done = end;
  }
  rest(done, text.size());
  return pieces;
}

std::vector<std::string_view> pre_tokenize(const std::vector<PreTokenizer>& steps, std::string_view text) {
  std::vector<std::string_view> pieces;
  if (!text.empty()) pieces.push_back(text);
  for (const PreTokenizer& step : steps) {
    std::vector<std::string_view> smaller;
    for (const std::string_view piece : pieces)
      for (const std::string_view part : std::visit([&](const auto& split) { return split(piece); }, step))
        smaller.push_back(part);
    pieces = std::move(smaller);
  }
  return pieces;
}

}  // namespace moraine::data
