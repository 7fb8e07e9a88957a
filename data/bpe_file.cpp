#include <algorithm>
#include <initializer_list>
#include <set>

#include "core/error.h"
#include "core/file.h"
#include "core/utf8.h"
#include "data/bpe_tokenizer.h"

namespace moraine::data {
namespace {

constexpr int64_t kLargestId = int64_t{1}
                               << 21;  // eight times the largest vocabulary known; bounds what a file allocates
constexpr const char* kHint =
    "Moraine reads byte-level BPE as GPT-2, Llama 3, Qwen2, OLMo2 and SmolLM have it (docs/data.md)";
// What ByteLevel splits by when use_regex is on: GPT-2's expression.
constexpr const char* kByteLevelPattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

// GPT-2's bytes_to_unicode: printable bytes are themselves, the others follow from U+0100 on.
std::array<char32_t, 256> byte_characters() {
  std::array<char32_t, 256> characters{};
  char32_t next = 256;
  for (size_t byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    characters[byte] = printable ? static_cast<char32_t>(byte) : next++;
  }
  return characters;
}

}  // namespace

// Fills a tokenizer from tokenizer.json, object by object; what is not understood is refused by its key.
class BpeFile {
 public:
  BpeFile(const core::Json& json, const std::string& origin) : json_(json), origin_(origin) {
    const auto characters = byte_characters();
    for (size_t byte = 0; byte < 256; ++byte) byte_of_[characters[byte]] = static_cast<char>(byte);
  }

  BpeTokenizer read() {
    keys(json_, "the file",
         {"version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor",
          "decoder", "model"});
    read_model(json_.at("model"));
    read_added(json_.value("added_tokens", core::Json::array()));
    read_normalizer(json_.value("normalizer", core::Json()));
    read_pre_tokenizer(json_.at("pre_tokenizer"));
    read_post_processor(json_.value("post_processor", core::Json()));
    const core::Json& decoder = json_.at("decoder");
    if (type_of(decoder) != "ByteLevel") refuse("decoder", type_of(decoder));
    return std::move(out_);
  }

 private:
  [[noreturn]] void refuse(std::string_view key, std::string_view value) const {
    throw core::UserError(fmt::format("data: {} '{}' of a tokenizer is not understood ({})", key, value, origin_),
                          kHint);
  }
  [[noreturn]] void malformed(const std::string& what) const {
    throw core::UserError(fmt::format("data: {} ({})", what, origin_), "save the tokenizer again, or fetch it again");
  }
  void keys(const core::Json& object, const char* where, std::initializer_list<std::string_view> known) const {
    for (const auto& [key, value] : object.items())
      if (std::find(known.begin(), known.end(), key) == known.end()) refuse(where, key);
  }
  // A key that may only say "off".
  void off(const core::Json& object, const char* key) const {
    const core::Json value = object.value(key, core::Json());
    if (!(value.is_null() || value == false || value == "" || value == 0)) refuse(key, value.dump());
  }
  static std::string type_of(const core::Json& object) {
    return object.is_object() ? object.value("type", "without a type") : object.dump();
  }

  // The bytes a token of the model stands for: one per character, unless some character stands for none.
  std::optional<std::string> bytes_of(const std::string& token) const {
    std::string bytes;
    for (size_t at = 0; at < token.size();) {
      const auto byte = byte_of_.find(core::next_code_point(token, at));
      if (byte == byte_of_.end()) return std::nullopt;
      bytes.push_back(byte->second);
    }
    return bytes;
  }

  BpeTokenizer::Token& token(int64_t id) {
    if (id < 0 || id >= kLargestId) malformed(fmt::format("a token has the id {}", id));
    if (static_cast<size_t>(id) >= out_.tokens_.size()) out_.tokens_.resize(static_cast<size_t>(id) + 1);
    return out_.tokens_[static_cast<size_t>(id)];
  }

  void read_model(const core::Json& model) {
    // Old files leave the type out; WordPiece and Unigram have no merges.
    if (model.value("type", "BPE") != "BPE") refuse("model type", type_of(model));
    keys(model, "model",
         {"type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk",
          "byte_fallback", "ignore_merges", "vocab", "merges"});
    for (const char* key : {"dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"})
      off(model, key);
    out_.ignore_merges_ = model.value("ignore_merges", false);
    for (const auto& [text, id] : model.at("vocab").items()) {
      BpeTokenizer::Token& entry = token(id.get<int64_t>());
      if (entry.exists) malformed(fmt::format("two tokens have the id {}", id.get<int64_t>()));
      const auto bytes = bytes_of(text);
      entry = {bytes.value_or(text), true, false};
      if (bytes) out_.ids_[*bytes] = id.get<int64_t>();
    }
    for (size_t byte = 0; byte < 256; ++byte) {
      const auto found = out_.ids_.find(std::string(1, static_cast<char>(byte)));
      out_.byte_ids_[byte] = found == out_.ids_.end() ? -1 : found->second;
    }
    int64_t rank = 0;
    for (const core::Json& merge : model.at("merges")) read_merge(merge, rank++);
  }

  void read_merge(const core::Json& merge, int64_t rank) {
    std::string left, right;
    if (merge.is_string()) {
      const auto& text = merge.get_ref<const std::string&>();
      const size_t space = text.find(' ');
      left = text.substr(0, space);
      right = space == std::string::npos ? "" : text.substr(space + 1);
    } else {
      left = merge.at(0).get<std::string>(), right = merge.at(1).get<std::string>();
    }
    const auto id = [&](const std::string& text) {
      const auto bytes = bytes_of(text);
      const auto found = bytes ? out_.ids_.find(*bytes) : out_.ids_.end();
      if (found == out_.ids_.end()) malformed(fmt::format("merge {} needs '{}', which is no token", rank, text));
      return found->second;
    };
    // A pair listed twice has its last rank, as in `tokenizers`.
    out_.merges_[{id(left), id(right)}] = {rank, id(left + right)};
  }

  void read_added(const core::Json& added) {
    for (const core::Json& entry : added) {
      keys(entry, "added token", {"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"});
      off(entry, "single_word");
      BpeTokenizer::AddedToken add{entry.at("content").get<std::string>(), entry.at("id").get<int64_t>(),
                                   entry.value("special", false), entry.value("lstrip", false),
                                   entry.value("rstrip", false)};
      if (add.text.empty()) malformed("an added token is empty");
      BpeTokenizer::Token& slot = token(add.id);
      const std::string bytes = bytes_of(add.text).value_or(add.text);
      if (slot.exists && slot.bytes != bytes) malformed(fmt::format("the added token '{}' has another's id", add.text));
      slot = {bytes, true, add.special};
      (entry.value("normalized", false) ? out_.added_after_normalizing_ : out_.added_).push_back(std::move(add));
    }
  }

  void read_normalizer(const core::Json& normalizer) {
    if (normalizer.is_null()) return;
    if (type_of(normalizer) != "NFC") refuse("normalizer", type_of(normalizer));
    out_.nfc_ = true;
    for (auto& add : out_.added_after_normalizing_) add.text = to_nfc(add.text);
  }

  void read_pre_tokenizer(const core::Json& pre) {
    if (type_of(pre) == "ByteLevel") return read_byte_level(pre);
    if (type_of(pre) != "Sequence") refuse("pre_tokenizer", type_of(pre));
    keys(pre, "pre_tokenizer", {"type", "pretokenizers"});
    const core::Json& steps = pre.at("pretokenizers");
    for (size_t i = 0; i < steps.size(); ++i) {
      const std::string type = type_of(steps[i]);
      if ((type == "ByteLevel") != (i + 1 == steps.size())) refuse("pre_tokenizer Sequence that ends in", type);
      if (type == "ByteLevel")
        read_byte_level(steps[i]);
      else if (type == "Digits")
        read_digits(steps[i]);
      else if (type == "Split")
        read_split(steps[i]);
      else
        refuse("pre_tokenizer", type);
    }
  }

  void read_byte_level(const core::Json& step) {
    keys(step, "ByteLevel", {"type", "add_prefix_space", "trim_offsets", "use_regex"});
    out_.add_prefix_space_ = step.value("add_prefix_space", true);
    if (step.value("use_regex", true)) out_.word_split_.emplace(RegexSplit{UnicodeRegex(kByteLevelPattern)});
  }

  void read_digits(const core::Json& step) {
    keys(step, "Digits", {"type", "individual_digits"});
    out_.pre_tokenizers_.push_back(digit_split(step.value("individual_digits", false)));
  }

  void read_split(const core::Json& step) {
    keys(step, "Split", {"type", "pattern", "behavior", "invert"});
    const core::Json& pattern = step.at("pattern");
    if (!pattern.contains("Regex")) refuse("pattern of Split", pattern.dump());
    const bool invert = step.value("invert", false);
    RegexSplit split{UnicodeRegex(pattern.at("Regex").get<std::string>())};
    const std::string behavior = step.at("behavior").get<std::string>();
    if (behavior == "Removed")
      (invert ? split.keep_rest : split.keep_matches) = false;
    else if (behavior != "Isolated")
      refuse("behavior of Split", behavior);
    out_.pre_tokenizers_.push_back(std::move(split));
  }

  void read_post_processor(const core::Json& post) {
    if (post.is_null() || type_of(post) == "ByteLevel") return;  // ByteLevel's concerns offsets only
    if (type_of(post) == "Sequence") {
      for (const core::Json& step : post.at("processors")) read_post_processor(step);
    } else if (type_of(post) == "TemplateProcessing") {
      read_template(post);
    } else {
      refuse("post_processor", type_of(post));
    }
  }

  void read_template(const core::Json& post) {
    bool text_seen = false;
    for (const core::Json& item : post.at("single")) {
      if (item.contains("Sequence")) {
        text_seen = true;
        continue;
      }
      const auto name = item.at("SpecialToken").at("id").get<std::string>();
      if (text_seen) refuse("post_processor with a token after the text,", name);
      for (const core::Json& id : post.at("special_tokens").at(name).at("ids"))
        out_.prefix_.push_back(id.get<int64_t>());
    }
  }

  const core::Json& json_;
  const std::string& origin_;
  std::unordered_map<char32_t, char> byte_of_;
  BpeTokenizer out_;
};

BpeTokenizer BpeTokenizer::from_json(const core::Json& json, const std::string& origin) {
  try {
    return BpeFile(json, origin).read();
  } catch (const core::Json::exception& error) {
    throw core::UserError(
        fmt::format("data: not the tokenizer.json of a byte-level BPE: {} ({})", error.what(), origin), kHint);
  }
}

BpeTokenizer BpeTokenizer::from_file(const std::filesystem::path& path) {
  core::require_file(path);
  return from_json(core::read_json(path), path.string());
}

}  // namespace moraine::data
