#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "core/json.h"
#include "data/pre_tokenizer.h"
#include "data/tokenizer.h"

namespace moraine::data {

/// Byte-level byte-pair encoding as a Hugging Face tokenizer.json describes it (GPT-2, Llama 3, Qwen2, OLMo2, SmolLM).
///
/// Understood: model BPE (merges as text or pairs, ignore_merges); normalizer none or NFC; pre_tokenizer ByteLevel, or
/// a Sequence of Digits and Split that ends in it; decoder ByteLevel; post_processor none, ByteLevel or a template that
/// puts tokens in front of the text; added tokens with lstrip, rstrip and normalized. `truncation` and `padding` are
/// not applied. Ids equal those of Hugging Face's `tokenizers` 0.22, with one exception: where it drops a byte that the
/// vocabulary lacks, encode() throws.
/// Source: Sennrich et al., arXiv 1508.07909 (merges); GPT-2 (bytes as printable characters).
class BpeTokenizer final : public Tokenizer {
 public:
  /// Throws UserError if the file is missing or malformed, and naming whatever in it is not understood.
  static BpeTokenizer from_file(const std::filesystem::path& path);
  static BpeTokenizer from_json(const core::Json& json, const std::string& origin);

  /// Throws UserError on text that is no UTF-8, and on a byte that the vocabulary lacks.
  std::vector<int64_t> encode(std::string_view text, SpecialTokens special) const override;
  std::string decode(std::span<const int64_t> tokens, bool skip_special) const override;
  std::vector<int64_t> prefix() const override { return prefix_; }
  int64_t vocab_size() const override { return static_cast<int64_t>(tokens_.size()); }

 private:
  friend class BpeFile;
  struct AddedToken {
    std::string text;
    int64_t id;
    bool special, lstrip, rstrip;
  };
  struct Token {
    std::string bytes;  // what it stands for
    bool exists = false, special = false;
  };
  struct Merge {
    int64_t rank, result;
  };
  struct PairHash {
    size_t operator()(const std::pair<int64_t, int64_t>& pair) const {
      return static_cast<size_t>(pair.first) * 0x9E3779B97F4A7C15u + static_cast<size_t>(pair.second);
    }
  };
  struct Piece {
    std::string_view text;
    int64_t added;  // the id of the added token that stands here, -1 for text
  };

  BpeTokenizer() = default;
  static std::vector<Piece> split(std::string_view text, const std::vector<AddedToken>& added, SpecialTokens special);
  void encode_text(std::string_view text, std::vector<int64_t>& out) const;
  void encode_word(std::string_view bytes, std::vector<int64_t>& out) const;

  std::vector<Token> tokens_;                     // by id
  std::unordered_map<std::string, int64_t> ids_;  // of the model's tokens, by their bytes
  std::array<int64_t, 256> byte_ids_{};           // -1 = the vocabulary lacks it
  std::unordered_map<std::pair<int64_t, int64_t>, Merge, PairHash> merges_;
  std::vector<AddedToken> added_, added_after_normalizing_;
  std::vector<RegexSplit> pre_tokenizers_;
  std::optional<RegexSplit> word_split_;  // ByteLevel's own, after the prefix space
  bool add_prefix_space_ = false, nfc_ = false, ignore_merges_ = false;
  std::vector<int64_t> prefix_;
};

}  // namespace moraine::data
