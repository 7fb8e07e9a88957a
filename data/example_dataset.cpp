#include "data/example_dataset.h"

#include <algorithm>
#include <array>
#include <functional>

#include <fmt/ranges.h>

#include "core/error.h"
#include "core/hdf5.h"
#include "core/json.h"
#include "data/fingerprint.h"
#include "data/token_stream.h"

namespace moraine::data {
namespace {

constexpr const char* kFormat = "moraine-text-examples";
constexpr int64_t kFormatVersion = 1;
constexpr std::array kSplits = {"train", "validation", "test"};
constexpr std::array kTasks = {"classification", "completion", "choice"};
constexpr const char* kPrepareAgain = "prepare it again with scripts/prepare_examples.py";

std::vector<std::string> names_in(const core::Hdf5File& file) {
  const core::Json json = core::parse_json(file.text_attribute("class_names").value_or("[]"), file.path().string());
  if (!json.is_array() || !std::ranges::all_of(json, [](const core::Json& name) { return name.is_string(); }))
    throw core::UserError(fmt::format("data: class_names is no list of names: {}", file.path().string()),
                          kPrepareAgain);
  return json.get<std::vector<std::string>>();
}

ExampleSetInfo read_info(const core::Hdf5File& file, const std::string& expected_tokenizer) {
  const std::string path = file.path().string();
  if (file.text_attribute("format") != kFormat)
    throw core::UserError(fmt::format("data: not a file of examples: {}", path),
                          "make one with scripts/prepare_examples.py");
  const int64_t version = file.int_attribute("format_version").value_or(0);
  if (version != kFormatVersion)
    throw core::UserError(
        fmt::format("data: format version {} of examples where this build reads {}: {}", version, kFormatVersion, path),
        kPrepareAgain);
  ExampleSetInfo info{file.text_attribute("name").value_or(""),
                      file.text_attribute("tokenizer").value_or(""),
                      file.int_attribute("vocab_size").value_or(0),
                      file.text_attribute("task").value_or(""),
                      names_in(file),
                      file.text_attribute("fingerprint").value_or("")};
  if (info.name.empty() || info.tokenizer.empty() || info.vocab_size < 1 || info.fingerprint.size() != 64)
    throw core::UserError(fmt::format("data: name, tokenizer, vocab_size or fingerprint missing: {}", path),
                          kPrepareAgain);
  if (std::ranges::find(kTasks, info.task) == kTasks.end() ||
      (info.task == "classification") != (info.class_names.size() > 1))
    throw core::UserError(fmt::format("data: task '{}' with {} classes: {}", info.task, info.class_names.size(), path),
                          kPrepareAgain);
  if (!expected_tokenizer.empty() && info.tokenizer != expected_tokenizer)
    throw core::UserError(fmt::format("data: made with another tokenizer: {} has '{}', expected '{}'", path,
                                      info.tokenizer, expected_tokenizer),
                          "prepare the examples with the model's tokenizer (scripts/prepare_examples.py --tokenizer "
                          "tokenizer.json)");
  return info;
}

}  // namespace

struct ExampleDataset::Split {
  ExampleSetInfo info;
  TokenStream tokens;
  std::vector<int64_t> starts, prompts, labels, groups, bytes;  // starts: one more than examples
  std::vector<int64_t> questions;                               // choice: where questions start, and the end

  Split(ExampleSetInfo of, const std::shared_ptr<const core::Hdf5File>& file, const std::string& name)
      : info(std::move(of)),
        tokens(file, name + "/tokens", info.vocab_size),
        starts(file->read_all<int64_t>(name + "/examples")),
        prompts(file->read_all<int64_t>(name + "/prompts")),
        labels(file->read_all<int64_t>(name + "/labels")),
        groups(info.task == "choice" ? file->read_all<int64_t>(name + "/groups") : std::vector<int64_t>()),
        bytes(file->read_all<int64_t>(name + "/bytes")) {
    if (const std::string wrong = problem(); !wrong.empty())
      throw core::UserError(fmt::format("data: {} of split '{}': {}", wrong, name, file->path().string()),
                            kPrepareAgain);
  }

  std::string problem() {
    const size_t count = labels.size();
    if (count == 0 || starts.size() != count + 1 || starts.front() != 0 || starts.back() != tokens.size() ||
        std::adjacent_find(starts.begin(), starts.end(), std::greater_equal<>()) != starts.end())
      return "examples do not cover the tokens";
    if (prompts.size() != count || bytes.size() != count || (info.task == "choice" && groups.size() != count))
      return "prompts, labels, groups or bytes are not as many as the examples";
    for (size_t i = 0; i < count; ++i) {
      const int64_t length = starts[i + 1] - starts[i];
      const bool given = info.task == "classification";
      if (given ? prompts[i] != length : prompts[i] < 1 || prompts[i] >= length)
        return fmt::format("example {} of {} tokens with a prompt of {}", i, length, prompts[i]);
      if (bytes[i] < 0) return fmt::format("example {} of {} bytes", i, bytes[i]);
      if (given && (labels[i] < 0 || labels[i] >= static_cast<int64_t>(info.class_names.size())))
        return fmt::format("label {} among {} classes", labels[i], info.class_names.size());
    }
    return info.task == "choice" ? find_questions() : "";
  }

  std::string find_questions() {
    for (size_t first = 0; first < groups.size();) {
      size_t end = first;
      int64_t right = 0;
      for (; end < groups.size() && groups[end] == groups[first]; ++end) right += labels[end] == 1;
      if (groups[first] != static_cast<int64_t>(questions.size()) || end - first < 2 || right != 1)
        return fmt::format("question {} has {} choices, {} of them right", groups[first], end - first, right);
      questions.push_back(static_cast<int64_t>(first));
      first = end;
    }
    questions.push_back(static_cast<int64_t>(groups.size()));
    return "";
  }
};

ExampleDataset::ExampleDataset(std::shared_ptr<const Split> split) : split_(std::move(split)) {}

ExampleDataset ExampleDataset::open(const std::filesystem::path& path, const std::string& split,
                                    const std::string& expected_tokenizer) {
  const auto file = std::make_shared<const core::Hdf5File>(path, core::Hdf5File::Mode::kRead);
  ExampleSetInfo info = read_info(*file, expected_tokenizer);
  if (std::ranges::find(kSplits, split) == kSplits.end() || !file->has(split + "/tokens"))
    throw core::UserError(fmt::format("data: no split '{}': {}", split, path.string()),
                          fmt::format("splits are {}", fmt::join(kSplits, ", ")));
  auto opened = std::make_shared<Split>(std::move(info), file, split);
  verify_fingerprint(*file, examples_fingerprint);
  return ExampleDataset(std::move(opened));
}

const ExampleSetInfo& ExampleDataset::info() const { return split_->info; }
int64_t ExampleDataset::size() const { return static_cast<int64_t>(split_->labels.size()); }
const std::vector<int64_t>& ExampleDataset::labels() const { return split_->labels; }

int64_t ExampleDataset::groups() const {
  return split_->questions.empty() ? size() : static_cast<int64_t>(split_->questions.size()) - 1;
}

std::pair<int64_t, int64_t> ExampleDataset::group(int64_t index) const {
  MORAINE_CHECK(index >= 0 && index < groups(), "data: question {} of {}", index, groups());
  if (split_->questions.empty()) return {index, index + 1};
  return {split_->questions[static_cast<size_t>(index)], split_->questions[static_cast<size_t>(index) + 1]};
}

int64_t ExampleDataset::length(int64_t index) const {
  MORAINE_CHECK(index >= 0 && index < size(), "data: example {} of {}", index, size());
  return split_->starts[static_cast<size_t>(index) + 1] - split_->starts[static_cast<size_t>(index)];
}

Example ExampleDataset::at(int64_t index) const {
  const auto i = static_cast<size_t>(index);
  Example example{std::vector<int64_t>(static_cast<size_t>(length(index))), split_->prompts[i], split_->labels[i],
                  split_->groups.empty() ? -1 : split_->groups[i], split_->bytes[i]};
  split_->tokens.copy(split_->starts[i], length(index), example.tokens.data());
  return example;
}

}  // namespace moraine::data
