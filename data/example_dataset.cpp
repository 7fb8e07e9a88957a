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

constexpr const char* kExampleFormat = "moraine-text-examples";
constexpr int64_t kExampleFormatVersion = 1;
constexpr std::array kExampleSplits = {"train", "validation", "test"};
constexpr std::array kTasks = {"classification", "completion", "choice"};
constexpr const char* kPrepareExamplesAgain = "prepare it again with scripts/prepare_examples.py";

std::vector<std::string> read_class_names(const core::Hdf5File& file, const std::string& task) {
  const std::string path = file.path().string();
  const core::Json names = core::parse_json(file.text_attribute("class_names").value_or("[]"), path);
  std::vector<std::string> out;
  bool texts = names.is_array();
  if (texts)
    for (const auto& name : names) {
      texts = texts && name.is_string() && !name.get<std::string>().empty();
      if (texts) out.push_back(name.get<std::string>());
    }
  if (!texts)
    throw core::UserError(fmt::format("data: class_names is no list of names: {}", path), kPrepareExamplesAgain);
  if ((task == "classification") != (out.size() >= 2) || (task != "classification" && !out.empty()))
    throw core::UserError(fmt::format("data: {} class_names do not fit task '{}': {}", out.size(), task, path),
                          kPrepareExamplesAgain);
  return out;
}

void check_format(const core::Hdf5File& file) {
  const std::string path = file.path().string();
  if (file.text_attribute("format") != kExampleFormat)
    throw core::UserError(fmt::format("data: not a file of examples: {}", path),
                          "make one with scripts/prepare_examples.py");
  const int64_t version = file.int_attribute("format_version").value_or(0);
  if (version != kExampleFormatVersion)
    throw core::UserError(fmt::format("data: text-examples format version {} where this build reads {}: {}", version,
                                      kExampleFormatVersion, path),
                          kPrepareExamplesAgain);
}

ExampleSetInfo read_example_info(const core::Hdf5File& file, const std::string& expected_tokenizer) {
  const std::string path = file.path().string();
  check_format(file);
  ExampleSetInfo info;
  info.name = file.text_attribute("name").value_or("");
  info.tokenizer = file.text_attribute("tokenizer").value_or("");
  info.vocab_size = file.int_attribute("vocab_size").value_or(0);
  info.task = file.text_attribute("task").value_or("");
  info.fingerprint = file.text_attribute("fingerprint").value_or("");
  if (info.name.empty() || info.tokenizer.empty() || info.vocab_size < 1 || info.fingerprint.size() != 64)
    throw core::UserError(fmt::format("data: name, tokenizer, vocab_size or fingerprint missing: {}", path),
                          kPrepareExamplesAgain);
  if (std::ranges::find(kTasks, info.task) == kTasks.end())
    throw core::UserError(fmt::format("data: unknown task '{}': {}", info.task, path),
                          fmt::format("tasks are {}", fmt::join(kTasks, ", ")));
  if (!expected_tokenizer.empty() && info.tokenizer != expected_tokenizer)
    throw core::UserError(
        fmt::format("data: made with another tokenizer: {} has '{}', expected '{}'", path, info.tokenizer,
                    expected_tokenizer),
        "prepare the examples with the model's tokenizer (scripts/prepare_examples.py --tokenizer tokenizer.json; "
        "without it text becomes bytes, 'bytes-v1')");
  info.class_names = read_class_names(file, info.task);
  return info;
}

}  // namespace

struct ExampleDataset::Split {
  std::string name, path;
  TokenStream tokens;
  std::vector<int64_t> starts;  // [examples + 1]
  std::vector<int64_t> prompts, labels, groups, bytes;
  std::vector<int64_t> questions;  // choice: where each starts, and the number of examples

  Split(const std::shared_ptr<const core::Hdf5File>& file, const std::string& split, const ExampleSetInfo& info)
      : name(split),
        path(file->path().string()),
        tokens(file, split + "/tokens", info.vocab_size),
        starts(file->read_all<int64_t>(split + "/examples")),
        prompts(file->read_all<int64_t>(split + "/prompts")),
        labels(file->read_all<int64_t>(split + "/labels")),
        bytes(file->read_all<int64_t>(split + "/bytes")) {
    const bool choice = info.task == "choice";
    if (choice != file->has(split + "/groups")) reject(fmt::format("groups do not fit task '{}'", info.task));
    if (choice) groups = file->read_all<int64_t>(split + "/groups");
    check_bounds();
    for (int64_t index = 0; index < size(); ++index) check_example(info, static_cast<size_t>(index));
    if (choice) check_questions();
    check_tokens();
  }

  [[noreturn]] void reject(const std::string& what) const {
    throw core::UserError(fmt::format("data: {} of split '{}': {}", what, name, path), kPrepareExamplesAgain);
  }

  int64_t size() const { return static_cast<int64_t>(starts.size()) - 1; }
  int64_t length(size_t index) const { return starts[index + 1] - starts[index]; }

  void check_bounds() const {
    if (starts.size() == 1 && starts[0] == 0 && tokens.size() == 0)
      throw core::UserError(fmt::format("data: split '{}' holds no examples: {}", name, path),
                            "prepare more examples, or give the split a larger share");
    if (starts.size() < 2 || starts.front() != 0 || starts.back() != tokens.size() ||
        std::ranges::adjacent_find(starts, std::ranges::greater_equal()) != starts.end())
      reject("examples do not cover the tokens");
    for (const auto& [values, what] : {std::pair(&prompts, "prompts"), {&labels, "labels"}, {&bytes, "bytes"}})
      if (values->size() != starts.size() - 1) reject(fmt::format("{} do not fit the examples", what));
  }

  void check_example(const ExampleSetInfo& info, size_t index) const {
    const int64_t prompt = prompts[index], label = labels[index], classes = std::ssize(info.class_names);
    if (info.task == "classification") {
      if (prompt != length(index)) reject(fmt::format("example {}: prompt {} is not the whole text", index, prompt));
      if (label < 0 || label >= classes)
        reject(fmt::format("example {}: label {} is outside the {} classes", index, label, classes));
      if (bytes[index] != 0) reject(fmt::format("example {}: nothing is predicted, but bytes are given", index));
      return;
    }
    if (prompt < 1 || prompt >= length(index))
      reject(fmt::format("example {}: prompt {} is outside [1, {})", index, prompt, length(index)));
    const int64_t highest = info.task == "choice" ? 1 : -1;
    if (label > highest || label < std::min<int64_t>(highest, 0))
      reject(fmt::format("example {}: label {} does not fit task '{}'", index, label, info.task));
    if (bytes[index] < 0) reject(fmt::format("example {}: bytes are negative", index));
  }

  void check_questions() {
    if (groups.size() != starts.size() - 1) reject("groups do not fit the examples");
    for (size_t index = 0; index < groups.size(); ++index) {
      const bool starts_one = index == 0 || groups[index] != groups[index - 1];
      if (starts_one) questions.push_back(static_cast<int64_t>(index));
      if (groups[index] != std::ssize(questions) - 1)
        reject(fmt::format("example {}: groups are not 0, 1, ...", index));
    }
    questions.push_back(size());
    for (size_t question = 0; question + 1 < questions.size(); ++question) {
      const auto first = labels.begin() + questions[question], last = labels.begin() + questions[question + 1];
      if (last - first < 2) reject(fmt::format("question {}: a single choice", question));
      if (const auto right = std::count(first, last, 1); right != 1)
        reject(fmt::format("question {}: {} right choices, not one", question, right));
    }
  }

  // Reads all: a token outside the vocabulary shows here, not in the middle of a run.
  void check_tokens() const {
    std::vector<int64_t> block(TokenStream::kBlockTokens);
    for (int64_t first = 0; first < tokens.size(); first += TokenStream::kBlockTokens)
      tokens.copy(first, std::min(TokenStream::kBlockTokens, tokens.size() - first), block.data());
  }
};

ExampleDataset ExampleDataset::open(const std::filesystem::path& path, const std::string& split,
                                    const std::string& expected_tokenizer) {
  const auto file = std::make_shared<const core::Hdf5File>(path, core::Hdf5File::Mode::kRead);
  ExampleSetInfo info = read_example_info(*file, expected_tokenizer);
  if (std::ranges::find(kExampleSplits, split) == kExampleSplits.end() || !file->has(split + "/tokens"))
    throw core::UserError(fmt::format("data: no split '{}': {}", split, path.string()),
                          fmt::format("splits are {}", fmt::join(kExampleSplits, ", ")));
  auto opened = std::make_shared<const Split>(file, split, info);
  verify_fingerprint(*file, examples_fingerprint);
  return ExampleDataset(std::move(info), std::move(opened));
}

ExampleDataset::ExampleDataset(ExampleSetInfo info, std::shared_ptr<const Split> split)
    : info_(std::move(info)), split_(std::move(split)) {}

int64_t ExampleDataset::size() const { return split_->size(); }

int64_t ExampleDataset::groups() const {
  return split_->questions.empty() ? size() : std::ssize(split_->questions) - 1;
}

std::pair<int64_t, int64_t> ExampleDataset::group(int64_t index) const {
  MORAINE_CHECK(index >= 0 && index < groups(), "data: group {} of {}", index, groups());
  if (split_->questions.empty()) return {index, index + 1};
  const auto at = static_cast<size_t>(index);
  return {split_->questions[at], split_->questions[at + 1]};
}

int64_t ExampleDataset::length(int64_t index) const {
  MORAINE_CHECK(index >= 0 && index < size(), "data: example {} of {}", index, size());
  return split_->length(static_cast<size_t>(index));
}

Example ExampleDataset::at(int64_t index) const {
  Example example;
  example.tokens.resize(static_cast<size_t>(length(index)));
  const auto at = static_cast<size_t>(index);
  split_->tokens.copy(split_->starts[at], std::ssize(example.tokens), example.tokens.data());
  example.prompt = split_->prompts[at];
  example.label = split_->labels[at];
  if (!split_->groups.empty()) example.group = split_->groups[at];
  example.bytes = split_->bytes[at];
  return example;
}

std::vector<int64_t> ExampleDataset::labels() const { return split_->labels; }

}  // namespace moraine::data
