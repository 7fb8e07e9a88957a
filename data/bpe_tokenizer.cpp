#include "data/bpe_tokenizer.h"

#include <algorithm>
#include <queue>
#include <tuple>

#include "core/error.h"
#include "core/utf8.h"

namespace moraine::data {
namespace {

// Bytes of white space at the beginning, or the end, of valid UTF-8.
size_t leading_space(std::string_view text) {
  size_t space = 0;
  for (size_t at = 0; at < text.size() && is_white_space(core::next_code_point(text, at));) space = at;
  return space;
}
size_t trailing_space(std::string_view text) {
  size_t kept = 0;
  for (size_t at = 0; at < text.size();)
    if (!is_white_space(core::next_code_point(text, at))) kept = at;
  return text.size() - kept;
}

}  // namespace

// Added tokens in text: the leftmost, of those the longest. One that does not count is passed over as a whole.
std::vector<BpeTokenizer::Piece> BpeTokenizer::split(std::string_view text, const std::vector<AddedToken>& added,
                                                     SpecialTokens special) {
  std::vector<Piece> pieces;
  size_t done = 0;
  for (size_t at = 0; at < text.size();) {
    const AddedToken* found = nullptr;
    for (const AddedToken& token : added)
      if (text.substr(at).starts_with(token.text) && (found == nullptr || token.text.size() > found->text.size()))
        found = &token;
    if (found == nullptr) {
      ++at;
      continue;
    }
    size_t first = at, end = at + found->text.size();
    at = end;
    if (found->special && special == SpecialTokens::kText) continue;
    if (found->lstrip) first = std::max(done, first - trailing_space(text.substr(0, first)));
    if (found->rstrip) end += leading_space(text.substr(end));
    if (done < first) pieces.push_back({text.substr(done, first - done), -1});
    pieces.push_back({text.substr(first, end - first), found->id});
    done = end;
  }
  if (done < text.size()) pieces.push_back({text.substr(done), -1});
  return pieces;
}

std::vector<int64_t> BpeTokenizer::encode(std::string_view text, SpecialTokens special) const {
  if (!core::is_utf8(text))
    throw core::UserError("data: the text is not UTF-8, as this tokenizer's text is",
                          "convert it, for example by iconv -f latin1 -t utf8");
  std::vector<int64_t> out;
  for (const Piece& raw : split(text, added_, special)) {
    if (raw.added >= 0) {
      out.push_back(raw.added);
      continue;
    }
    const std::string normalised = nfc_ ? to_nfc(raw.text) : std::string(raw.text);
    for (const Piece& piece : split(normalised, added_after_normalizing_, special)) {
      if (piece.added >= 0)
        out.push_back(piece.added);
      else
        encode_text(piece.text, out);
    }
  }
  return out;
}

void BpeTokenizer::encode_text(std::string_view text, std::vector<int64_t>& out) const {
  for (const std::string_view piece : pre_tokenize(pre_tokenizers_, text)) {
    const std::string prefixed = (add_prefix_space_ && piece.front() != ' ' ? " " : "") + std::string(piece);
    if (!word_split_) {
      encode_word(prefixed, out);
      continue;
    }
    for (const std::string_view word : (*word_split_)(prefixed)) encode_word(word, out);
  }
}

// Joins the pair of lowest rank, of those the leftmost, until none is left; time n log n.
void BpeTokenizer::encode_word(std::string_view bytes, std::vector<int64_t>& out) const {
  if (ignore_merges_) {
    if (const auto whole = ids_.find(std::string(bytes)); whole != ids_.end()) return out.push_back(whole->second);
  }
  struct Symbol {
    int64_t id;
    size_t previous, next;  // bytes.size() = none
  };
  const size_t none = bytes.size();
  std::vector<Symbol> symbols;
  for (size_t i = 0; i < bytes.size(); ++i) {
    const int64_t id = byte_ids_[static_cast<unsigned char>(bytes[i])];
    if (id < 0)
      throw core::UserError(fmt::format("data: the tokenizer has no token for the byte 0x{:02X}, in '{}'",
                                        static_cast<unsigned char>(bytes[i]), core::as_utf8(bytes)),
                            "leave that character out; the model has never seen it");
    symbols.push_back({id, i == 0 ? none : i - 1, i + 1});
  }
  using Candidate = std::tuple<int64_t, size_t, int64_t>;  // rank, position of the left symbol, result
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> candidates;
  const auto consider = [&](size_t left) {
    if (left == none || symbols[left].next == none) return;
    const auto merge = merges_.find({symbols[left].id, symbols[symbols[left].next].id});
    if (merge != merges_.end()) candidates.emplace(merge->second.rank, left, merge->second.result);
  };
  for (size_t i = 0; i < symbols.size(); ++i) consider(i);
  while (!candidates.empty()) {
    const auto [rank, left, result] = candidates.top();
    candidates.pop();
    const size_t right = symbols[left].id < 0 ? none : symbols[left].next;
    if (right == none) continue;
    const auto merge = merges_.find({symbols[left].id, symbols[right].id});
    if (merge == merges_.end() || merge->second.result != result) continue;  // a neighbour was joined since
    symbols[left] = {result, symbols[left].previous, symbols[right].next};
    symbols[right].id = -1;
    if (symbols[left].next != none) symbols[symbols[left].next].previous = left;
    consider(symbols[left].previous);
    consider(left);
  }
  for (const Symbol& symbol : symbols)
    if (symbol.id >= 0) out.push_back(symbol.id);
}

std::string BpeTokenizer::decode(std::span<const int64_t> tokens, bool skip_special) const {
  std::string text;
  for (const int64_t id : tokens) {
    if (id < 0 || id >= vocab_size() || !tokens_[static_cast<size_t>(id)].exists) {
      core::append_utf8(text, U'\uFFFD');
      continue;
    }
    const Token& token = tokens_[static_cast<size_t>(id)];
    if (!(skip_special && token.special)) text += token.bytes;
  }
  return text;
}

}  // namespace moraine::data
