#include "data/text_dataset.h"

#include <algorithm>
#include <array>
#include <functional>
#include <utility>

#include <fmt/ranges.h>

#include "core/error.h"
#include "core/hash.h"
#include "core/hdf5.h"
#include "data/fingerprint.h"
#include "data/permutation.h"
#include "data/token_stream.h"

namespace moraine::data {

namespace {

constexpr const char* kFormat = "moraine-text-domain";
constexpr int64_t kFormatVersion = 1;
constexpr std::array kSplits = {"train", "validation", "test"};
constexpr const char* kPrepareAgain = "prepare it again with scripts/prepare_text.py";

TextDomainInfo read_info(const core::Hdf5File& file, const std::string& expected_tokenizer) {
  const std::string path = file.path().string();
  if (file.text_attribute("format") != kFormat)
    throw core::UserError(fmt::format("data: not a text-domain file: {}", path),
                          "make one with scripts/prepare_text.py");
  const int64_t version = file.int_attribute("format_version").value_or(0);
  if (version != kFormatVersion)
    throw core::UserError(
        fmt::format("data: text-domain format version {} where this build reads {}: {}", version, kFormatVersion, path),
        kPrepareAgain);
  TextDomainInfo info{file.text_attribute("name").value_or(""), file.text_attribute("tokenizer").value_or(""),
                      file.int_attribute("vocab_size").value_or(0), file.text_attribute("fingerprint").value_or("")};
  if (info.name.empty() || info.tokenizer.empty() || info.vocab_size < 1 || info.fingerprint.size() != 64)
    throw core::UserError(fmt::format("data: name, tokenizer, vocab_size or fingerprint missing: {}", path),
                          kPrepareAgain);
  if (!expected_tokenizer.empty() && info.tokenizer != expected_tokenizer)
    throw core::UserError(
        fmt::format("data: made with another tokenizer: {} has '{}', expected '{}'", path, info.tokenizer,
                    expected_tokenizer),
        "prepare the text with the model's tokenizer (scripts/prepare_text.py --tokenizer tokenizer.json; "
        "without it the text becomes bytes, 'bytes-v1')");
  return info;
}

}  // namespace

struct TextDataset::Split {
  std::shared_ptr<const core::Hdf5File> file;
  std::string group;
  TokenStream tokens;
  std::vector<int64_t> ends;  // per document: the token after its end of document
  bool stores_bytes;          // byte tokens need no stored sizes: one byte each, none for the end of a document

  Split(const std::shared_ptr<const core::Hdf5File>& from, const std::string& name, int64_t vocab_size)
      : file(from),
        group(name),
        tokens(from, name + "/tokens", vocab_size),
        ends(from->read_all<int64_t>(name + "/documents")),
        stores_bytes(from->has(name + "/byte_offsets")) {}

  /// Bytes that the tokens [0, count) stand for.
  int64_t bytes_before(int64_t count) const {
    if (stores_bytes) return file->read<int64_t>(group + "/byte_offsets", count, 1).at(0);
    return count - (std::upper_bound(ends.begin(), ends.end(), count) - ends.begin());
  }

  void check(const std::string& tokenizer) {
    const auto reject = [this](const std::string& what) {
      throw core::UserError(fmt::format("data: {} of split '{}': {}", what, group, file->path().string()),
                            kPrepareAgain);
    };
    if (ends.size() < 2 || ends.front() != 0 || ends.back() != tokens.size() ||
        std::adjacent_find(ends.begin(), ends.end(), std::greater_equal<>()) != ends.end())
      reject("documents do not cover the tokens");
    ends.erase(ends.begin());
    if (stores_bytes && file->shape(group + "/byte_offsets") != std::vector<int64_t>{tokens.size() + 1})
      reject("byte_offsets do not fit the tokens");
    if (stores_bytes == (tokenizer == ByteTokenizer::kName))
      reject(fmt::format("byte_offsets do not fit tokenizer '{}'", tokenizer));
  }
};

TextDataset TextDataset::open(const std::filesystem::path& path, const std::string& split, int64_t seq_len,
                              const std::string& expected_tokenizer) {
  if (seq_len < 1)
    throw core::UserError(fmt::format("data: sequence length must be positive: {}", seq_len),
                          "set seq_len to 1 or more");
  const auto file = std::make_shared<const core::Hdf5File>(path, core::Hdf5File::Mode::kRead);
  TextDomainInfo info = read_info(*file, expected_tokenizer);
  if (std::find(kSplits.begin(), kSplits.end(), split) == kSplits.end() || !file->has(split + "/tokens"))
    throw core::UserError(fmt::format("data: no split '{}': {}", split, path.string()),
                          fmt::format("splits are {}", fmt::join(kSplits, ", ")));

  auto opened = std::make_shared<Split>(file, split, info.vocab_size);
  const int64_t size = opened->tokens.size();
  if (size < seq_len + 1)
    throw core::UserError(fmt::format("data: split '{}' has {} tokens, fewer than one sequence of {} + 1: {}", split,
                                      size, seq_len, path.string()),
                          "prepare more text, give the split a larger share, or lower seq_len");
  opened->check(info.tokenizer);
  verify_fingerprint(*file, text_fingerprint);
  return TextDataset(std::move(info), seq_len, std::move(opened));
}

TextDataset::TextDataset(TextDomainInfo info, int64_t seq_len, std::shared_ptr<const Split> split)
    : info_(std::move(info)), seq_len_(seq_len), split_(std::move(split)) {}

int64_t TextDataset::num_tokens() const { return split_->tokens.size(); }

int64_t TextDataset::num_sequences() const { return (num_tokens() - 1) / seq_len_; }

int64_t TextDataset::num_eval_sequences() const { return (num_tokens() - 2) / seq_len_ + 1; }

int64_t TextDataset::num_bytes() const { return eval_bytes(0, num_eval_sequences()); }

std::vector<int64_t> TextDataset::training_rows(uint64_t seed, int64_t first, int64_t count) const {
  MORAINE_CHECK(first >= 0 && count >= 1, "data: training rows [{}, {})", first, first + count);
  const int64_t width = seq_len_ + 1, per_epoch = num_sequences();
  std::vector<int64_t> rows(static_cast<size_t>(count * width));
  for (int64_t row = 0, place = first; row < count;) {
    const int64_t epoch = place / per_epoch;
    const Permutation order(per_epoch, core::derive_seed(seed, fmt::format("data/shuffle/epoch{}", epoch)));
    for (; row < count && place / per_epoch == epoch; ++row, ++place)
      split_->tokens.copy(order(place % per_epoch) * seq_len_, width, rows.data() + row * width);
  }
  return rows;
}

std::vector<int64_t> TextDataset::sequence(int64_t index) const {
  MORAINE_CHECK(index >= 0 && index < num_sequences(), "data: sequence {} of {}", index, num_sequences());
  std::vector<int64_t> row(static_cast<size_t>(seq_len_ + 1));
  split_->tokens.copy(index * seq_len_, seq_len_ + 1, row.data());
  return row;
}

std::vector<int64_t> TextDataset::eval_batch(int64_t first, int64_t count) const {
  MORAINE_CHECK(first >= 0 && count >= 0, "data: evaluation sequences [{}, {})", first, first + count);
  const int64_t width = seq_len_ + 1;
  std::vector<int64_t> rows(static_cast<size_t>(count * width), -1);
  for (int64_t row = 0; row < std::min(count, num_eval_sequences() - first); ++row) {
    const int64_t begin = (first + row) * seq_len_;
    split_->tokens.copy(begin, std::min(width, num_tokens() - begin), rows.data() + row * width);
  }
  return rows;
}

int64_t TextDataset::eval_bytes(int64_t first, int64_t count) const {
  MORAINE_CHECK(first >= 0 && count >= 0, "data: evaluation sequences [{}, {})", first, first + count);
  const auto predicted_until = [this](int64_t sequence) { return std::min(sequence * seq_len_, num_tokens() - 1) + 1; };
  return split_->bytes_before(predicted_until(first + count)) - split_->bytes_before(predicted_until(first));
}

}  // namespace moraine::data
