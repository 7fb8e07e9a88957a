#include "data/byte_tokenizer.h"

#include "core/error.h"
#include "core/utf8.h"

namespace moraine::data {

std::vector<int64_t> ByteTokenizer::encode(std::string_view text) {
  std::vector<int64_t> tokens;
  tokens.reserve(text.size());
  for (const char c : text) tokens.push_back(static_cast<unsigned char>(c));
  return tokens;
}

std::string ByteTokenizer::decode(const std::vector<int64_t>& tokens) {
  std::string text;
  text.reserve(tokens.size());
  for (const int64_t token : tokens) {
    if (token == kEndOfDocument) continue;
    if (token < 0 || token > 255)
      throw core::UserError(fmt::format("data: not a byte token: {}", token),
                            "decode with the tokenizer that made these tokens");
    text.push_back(static_cast<char>(token));
  }
  return text;
}

std::string ByteTokenizer::decode(std::span<const int64_t> tokens,
                                  bool /*skip_special: it is spelt with no text*/) const {
  std::string text;
  for (const int64_t token : tokens) {
    if (token >= 0 && token < kEndOfDocument)
      text.push_back(static_cast<char>(token));
    else if (token != kEndOfDocument)
      core::append_utf8(text, U'\uFFFD');
  }
  return text;
}

}  // namespace moraine::data
