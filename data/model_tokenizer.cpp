#include "data/model_tokenizer.h"

#include <mutex>
#include <optional>
#include <set>

#include "core/error.h"
#include "core/file.h"
#include "core/hash.h"
#include "core/json.h"
#include "core/log.h"
#include "data/bpe_tokenizer.h"
#include "data/byte_tokenizer.h"

namespace moraine::data {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kLargestByteVocabulary = 512;  // 257 tokens and what padding a model likes

// "hf:<SHA-256>" of the directory's tokenizer.json; nullopt when there is none, or one without a model in it.
std::optional<std::string> tokenizer_in(const fs::path& directory) {
  const fs::path path = directory / "tokenizer.json";
  if (!fs::exists(path)) return std::nullopt;
  core::require_file(path);
  const std::string text = core::read_text(path);
  const core::Json json = core::Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object() || !json.contains("model")) return std::nullopt;
  return "hf:" + core::sha256(text);
}

bool first_time(const std::string& what) {
  static std::mutex mutex;
  static std::set<std::string> said;
  const std::lock_guard lock(mutex);
  return said.insert(what).second;
}

}  // namespace

void check_model_tokenizer(const TextDomainInfo& text, const fs::path& text_path, const fs::path& model_directory,
                           int64_t model_vocabulary) {
  if (text.vocab_size > model_vocabulary)
    throw core::UserError(fmt::format("data: {} has {} token ids, the model's vocabulary is {}", text_path.string(),
                                      text.vocab_size, model_vocabulary),
                          "prepare the text with the model's own tokeniser");
  if (model_directory.empty()) return;
  const auto own = tokenizer_in(model_directory);
  if (own && *own != text.tokenizer)
    throw core::UserError(
        fmt::format("data: {} was prepared with the tokenizer '{}', the model in {} has '{}'", text_path.string(),
                    text.tokenizer, model_directory.string(), *own),
        fmt::format(
            "prepare the text with scripts/prepare_text.py --tokenizer {}; or remove that file if it is not the "
            "model's",
            (model_directory / "tokenizer.json").string()));
  const bool bytes = text.tokenizer == ByteTokenizer::kName && model_vocabulary <= kLargestByteVocabulary;
  if (!own && !bytes && first_time(text_path.string() + "\n" + model_directory.string()))
    core::log::warn(
        "the model does not say which tokenizer it was trained with, the text's may be another: model={} "
        "text={} tokenizer={}",
        model_directory.string(), text_path.string(), text.tokenizer);
}

std::unique_ptr<const Tokenizer> model_tokenizer(const fs::path& model_directory, int64_t model_vocabulary) {
  const fs::path path = model_directory / "tokenizer.json";
  if (fs::exists(path)) {
    auto tokenizer = std::make_unique<BpeTokenizer>(BpeTokenizer::from_file(path));
    if (tokenizer->vocab_size() > model_vocabulary)
      throw core::UserError(fmt::format("data: {} has {} token ids, the model's vocabulary is {}", path.string(),
                                        tokenizer->vocab_size(), model_vocabulary),
                            "put the model's own tokenizer.json beside it");
    return tokenizer;
  }
  if (model_vocabulary >= ByteTokenizer::kVocabSize && model_vocabulary <= kLargestByteVocabulary)
    return std::make_unique<ByteTokenizer>();
  throw core::UserError(fmt::format("data: {} holds no tokenizer.json, and a vocabulary of {} is not that of bytes",
                                    model_directory.string(), model_vocabulary),
                        "copy the tokenizer.json of the model it was made from there");
}

}  // namespace moraine::data
