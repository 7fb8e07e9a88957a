#include "data/pre_tokenizer.h"

namespace moraine::data {

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

RegexSplit digit_split(bool individual) { return {UnicodeRegex(individual ? R"(\p{N})" : R"(\p{N}+)")}; }

std::vector<std::string_view> pre_tokenize(const std::vector<RegexSplit>& steps, std::string_view text) {
  std::vector<std::string_view> pieces;
  if (!text.empty()) pieces.push_back(text);
  for (const RegexSplit& step : steps) {
    std::vector<std::string_view> smaller;
    for (const std::string_view piece : pieces)
      for (const std::string_view part : step(piece)) smaller.push_back(part);
    pieces = std::move(smaller);
  }
  return pieces;
}

}  // namespace moraine::data
