#include "data/unicode_regex.h"

#include <limits>

#include <unicode/normalizer2.h>
#include <unicode/uchar.h>
#include <unicode/uregex.h>
#include <unicode/utext.h>

#include "core/error.h"

namespace moraine::data {
namespace {

constexpr std::string_view kEscapedLiterals = "\\/'\"-[](){}.*+?|^$&#~!:;,=<>@%_` ";
constexpr std::string_view kSharedClasses = "sSdDrntf";  // what \x means to both libraries

struct CloseText {
  void operator()(UText* text) const { utext_close(text); }
};
using Text = std::unique_ptr<UText, CloseText>;

constexpr int32_t kLongestSearch = 100'000;  // ICU's units, some 10^4 steps each: ten seconds or so

[[noreturn]] void refuse(const std::string& pattern, std::string_view what) {
  throw core::UserError(
      fmt::format("data: a tokenizer's regular expression is not understood: {} in {}", what, pattern),
      "only byte-level BPE with splits like those of GPT-2, Llama 3 and Qwen2 can be read");
}

Text utf8(std::string_view text) {
  UErrorCode status = U_ZERO_ERROR;
  Text opened(utext_openUTF8(nullptr, text.data(), static_cast<int64_t>(text.size()), &status));
  MORAINE_CHECK(U_SUCCESS(status), "utext_openUTF8: {}", u_errorName(status));
  return opened;
}

// Reads a pattern once from front to back and refuses what the two libraries read differently.
class PatternCheck {
 public:
  explicit PatternCheck(const std::string& pattern) : pattern_(pattern) {}

  void run() {
    while (at_ < pattern_.size()) {
      const char c = pattern_[at_];
      if (c == '\\') {
        escape();
      } else if (in_set_) {
        set_member();
      } else if (c == '[') {
        in_set_ = true;
        at_ += next_is("[^") ? 2 : 1;
      } else if (c == '(') {
        group();
      } else if (c == '}' && at_ + 1 < pattern_.size() && std::string_view("+?*").find(pattern_[at_ + 1]) < 3) {
        refuse(pattern_, fmt::format("'}}{}'", pattern_[at_ + 1]));
      } else if (c == '.' || c == '^' || c == '$') {
        refuse(pattern_, fmt::format("'{}'", c));
      } else {
        ++at_;
      }
    }
  }

 private:
  bool next_is(std::string_view text) const { return std::string_view(pattern_).substr(at_).starts_with(text); }

  void escape() {
    const char c = at_ + 1 < pattern_.size() ? pattern_[at_ + 1] : '\0';
    if (c == 'p' || c == 'P') {
      const size_t end = pattern_.find('}', at_);
      // Names of one or two letters are general categories to both: \p{L}, \p{Lu}.
      if (pattern_.compare(at_ + 2, 1, "{") != 0 || end == std::string::npos || end - at_ > 5)
        refuse(pattern_, pattern_.substr(at_, end == std::string::npos ? end : end + 1 - at_));
      at_ = end + 1;
      return;
    }
    if (c == '\0' ||
        (kSharedClasses.find(c) == std::string_view::npos && kEscapedLiterals.find(c) == std::string_view::npos))
      refuse(pattern_, fmt::format("'{}'", pattern_.substr(at_, 2)));
    at_ += 2;
  }

  void set_member() {
    for (const char* operation : {"[", "&&", "--"})
      if (next_is(operation)) refuse(pattern_, fmt::format("'{}' within [...]", operation));
    in_set_ = pattern_[at_++] != ']';
  }

  void group() {
    if (!next_is("(?")) {
      ++at_;
      return;
    }
    for (const std::string_view known : {"(?:", "(?i:", "(?!", "(?="}) {
      if (!next_is(known)) continue;
      at_ += known.size();
      return;
    }
    refuse(pattern_, fmt::format("'{}'", pattern_.substr(at_, 4)));
  }

  const std::string& pattern_;
  size_t at_ = 0;
  bool in_set_ = false;
};

}  // namespace

void UnicodeRegex::Close::operator()(URegularExpression* regex) const { uregex_close(regex); }

UnicodeRegex::UnicodeRegex(const std::string& pattern) {
  PatternCheck(pattern).run();
  UErrorCode status = U_ZERO_ERROR;
  UParseError place{};
  compiled_.reset(uregex_openUText(utf8(pattern).get(), 0, &place, &status));
  if (U_FAILURE(status)) refuse(pattern, u_errorName(status));
}

std::vector<std::pair<size_t, size_t>> UnicodeRegex::matches(std::string_view text) const {
  UErrorCode status = U_ZERO_ERROR;
  const std::unique_ptr<URegularExpression, Close> search(uregex_clone(compiled_.get(), &status));
  const Text subject = utf8(text);
  uregex_setTimeLimit(search.get(), kLongestSearch, &status);
  uregex_setUText(search.get(), subject.get(), &status);
  std::vector<std::pair<size_t, size_t>> found;
  while (uregex_findNext(search.get(), &status) && U_SUCCESS(status)) {
    const int64_t first = uregex_start64(search.get(), 0, &status), end = uregex_end64(search.get(), 0, &status);
    if (first < end) found.emplace_back(static_cast<size_t>(first), static_cast<size_t>(end));
  }
  if (U_FAILURE(status))
    throw core::UserError(fmt::format("data: the tokenizer cannot split this text: {}", u_errorName(status)),
                          "shorten the text, or break its longest run of like characters");
  return found;
}

std::string to_nfc(std::string_view text) {
  MORAINE_CHECK(text.size() <= std::numeric_limits<int32_t>::max(), "text of {} bytes", text.size());
  UErrorCode status = U_ZERO_ERROR;
  const icu::Normalizer2* nfc = icu::Normalizer2::getNFCInstance(status);
  std::string normalised;
  icu::StringByteSink<std::string> sink(&normalised);
  if (U_SUCCESS(status))
    nfc->normalizeUTF8(0, icu::StringPiece(text.data(), static_cast<int32_t>(text.size())), sink, nullptr, status);
  MORAINE_CHECK(U_SUCCESS(status), "NFC: {}", u_errorName(status));
  return normalised;
}

bool is_white_space(char32_t code_point) { return u_isUWhiteSpace(static_cast<UChar32>(code_point)) != 0; }

}  // namespace moraine::data
