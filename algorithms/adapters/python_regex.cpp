#include "algorithms/adapters/python_regex.h"

#include <cctype>
#include <regex>
#include <set>
#include <string_view>

#include "core/error.h"

namespace moraine::algorithms::adapters {
namespace {

constexpr size_t kLongestPattern = 4000, kLongestPath = 1000;

bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_word(char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_'; }

/// Writes a Python pattern in ECMAScript syntax.
class Translator {
 public:
  explicit Translator(std::string_view pattern) : in_(pattern) {}

  std::string translate() {
    while (at_ < in_.size()) {
      const char c = in_[at_];
      if (static_cast<unsigned char>(c) < 0x20 || static_cast<unsigned char>(c) > 0x7e) refuse("characters but ASCII");
      if (c == '\\') {
        escape(/*in_class=*/false);
      } else if (c == '[') {
        character_class();
      } else if (c == '(') {
        open_group();
      } else if (c == '*' || c == '+' || c == '?') {
        ++at_;
        quantifier(std::string(1, c));
      } else if (c == '{') {
        braces();
      } else {
        if (c == '}' || c == ']') out_ += '\\';  // literal in Python
        out_ += c;
        ++at_;
      }
    }
    return out_;
  }

 private:
  [[noreturn]] void refuse(const std::string& what) const {
    throw core::UserError(
        fmt::format("algorithms/adapters: regular expression '{}': {} cannot be read as Python reads them", in_, what),
        "write it with groups, classes, repetitions and look-ahead; or name the modules in a list");
  }
  char peek(size_t ahead = 0) const { return at_ + ahead < in_.size() ? in_[at_ + ahead] : '\0'; }

  void escape(bool in_class) {
    const char next = peek(1);
    if (next == '\0') refuse("a backslash at the end");
    at_ += 2;
    if (!in_class && next == 'A') {
      out_ += '^';
    } else if (!in_class && next == 'Z') {
      out_ += '$';
    } else if (std::string_view("dDsSwWnrtfv").find(next) != std::string_view::npos ||
               (!in_class && (next == 'b' || next == 'B')) || !is_word(next) || next == '_') {
      if (next != '_' && static_cast<unsigned char>(next) <= 0x7e) out_ += '\\';
      out_ += next;
    } else {
      refuse(fmt::format("escapes such as \\{}", next));
    }
  }

  void character_class() {
    out_ += '[', ++at_;
    if (peek() == '^') out_ += '^', ++at_;
    for (bool first = true;; first = false) {
      const char c = peek();
      if (c == '\0') refuse("a class without its ]");
      if (static_cast<unsigned char>(c) > 0x7e) refuse("characters but ASCII");
      if (c == ']' && !first) break;
      if (c == '\\') {
        escape(/*in_class=*/true);
        continue;
      }
      if (c == ']' || c == '[') out_ += '\\';  // literal in Python
      out_ += c, ++at_;
    }
    out_ += ']', ++at_;
  }

  void open_group() {
    if (peek(1) == '?') {
      const std::string_view rest = in_.substr(at_);
      if (rest.starts_with("(?:") || rest.starts_with("(?=") || rest.starts_with("(?!")) {
        out_ += rest.substr(0, 3), at_ += 3;
        return;
      }
      const size_t end = rest.find('>');
      if (!rest.starts_with("(?P<") || end == std::string_view::npos)
        refuse(fmt::format("groups such as {}", rest.substr(0, 4)));
      if (!names_.insert(rest.substr(0, end)).second) refuse("group names that stand twice");
      at_ += end + 1;  // a name without references is a plain group
    } else {
      ++at_;
    }
    out_ += '(';
  }

  // "{3}", "{3,}", "{3,5}" and "{,5}" repeat; any other brace is literal.
  void braces() {
    size_t end = at_ + 1;
    const size_t low = end;
    while (end < in_.size() && is_digit(in_[end])) ++end;
    std::string least(in_.substr(low, end - low)), most = least;
    const bool comma = end < in_.size() && in_[end] == ',';
    if (comma) {
      const size_t high = ++end;
      while (end < in_.size() && is_digit(in_[end])) ++end;
      most = in_.substr(high, end - high);
    }
    if (end >= in_.size() || in_[end] != '}' || (least.empty() && most.empty())) {
      out_ += "\\{", ++at_;
      return;
    }
    if (least.size() > 3 || most.size() > 3) refuse("more than 999 repetitions");
    at_ = end + 1;
    quantifier(fmt::format("{{{}{}{}}}", least.empty() ? "0" : least, comma ? "," : "", comma ? most : ""));
  }

  void quantifier(const std::string& text) {
    out_ += text;
    if (peek() == '?') out_ += '?', ++at_;
    const char next = peek();
    if (next == '*' || next == '+' || next == '?' || (next == '{' && (is_digit(peek(1)) || peek(1) == ',')))
      refuse("possessive or repeated quantifiers");
  }

  std::string_view in_;
  size_t at_ = 0;
  std::string out_;
  std::set<std::string_view> names_;
};

}  // namespace

bool python_full_match(const std::string& pattern, const std::string& path) {
  if (pattern.size() > kLongestPattern || path.size() > kLongestPath)
    throw core::UserError(
        fmt::format("algorithms/adapters: a pattern of {} characters or a path of {} is longer than can be matched",
                    pattern.size(), path.size()),
        fmt::format("patterns have at most {} characters, module paths {}", kLongestPattern, kLongestPath));
  const std::string translated = Translator(pattern).translate();
  try {
    // Polynomial: no exponential search, no recursion as deep as the path is long.
    return std::regex_match(path, std::regex(translated, std::regex::ECMAScript | std::regex_constants::__polynomial));
  } catch (const std::regex_error& error) {
    throw core::UserError(
        fmt::format("algorithms/adapters: malformed regular expression '{}': {}", pattern, error.what()),
        "escape special characters: \\. for a dot");
  }
}

}  // namespace moraine::algorithms::adapters
