#include "data/byte_tokenizer.h"

#include "core/error.h"

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

}  // namespace moraine::data
