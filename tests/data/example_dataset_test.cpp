#include "data/example_dataset.h"

#include <cstdlib>
#include <functional>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <sys/wait.h>

#include "core/error.h"
#include "core/hdf5.h"
#include "core/json.h"
#include "data/fingerprint.h"
#include "tests/fuzz/mutators.h"
#include "tests/temporary_directory.h"

namespace moraine::data {
namespace {

using core::Hdf5File;
using testing::HasSubstr;
using Values = std::vector<int64_t>;

/// The parts of a file of examples with one split, each of which a test may spoil.
struct ExampleParts {
  std::string format = "moraine-text-examples", tokenizer = "bytes-v1", task, class_names = "[]";
  int64_t version = 1, vocab_size = 257;
  Values tokens, starts, prompts, labels, groups, bytes;
  std::string fingerprint;  // empty: the content's own
};

ExampleParts classification() {
  ExampleParts parts;
  parts.task = "classification", parts.class_names = R"(["no","yes"])";
  parts.tokens = {'a', 'b', 'c', 'd', 'e', 'f'}, parts.starts = {0, 2, 3, 6}, parts.prompts = {2, 1, 3};
  parts.labels = {1, 0, 1}, parts.bytes = {0, 0, 0};
  return parts;
}

ExampleParts completion() {
  ExampleParts parts;
  parts.task = "completion";
  parts.tokens = {'a', 'b', 256, 'c', 'd', 'e', 256}, parts.starts = {0, 3, 7}, parts.prompts = {1, 2};
  parts.labels = {-1, -1}, parts.bytes = {1, 1};
  return parts;
}

// Two questions of two and three choices.
ExampleParts choice() {
  ExampleParts parts;
  parts.task = "choice";
  parts.tokens = {'q', 'a', 'q', 'b', 'r', 'a', 'r', 'b', 'r', 'c', 'd'}, parts.starts = {0, 2, 4, 6, 8, 11};
  parts.prompts = {1, 1, 1, 1, 1}, parts.labels = {0, 1, 1, 0, 0}, parts.groups = {0, 0, 1, 1, 1};
  parts.bytes = {1, 1, 1, 1, 2};
  return parts;
}

class ExampleDatasetTest : public testing::Test {
 protected:
  std::filesystem::path write(const ExampleParts& parts) {
    const auto path = folder_ / "examples.h5";
    Hdf5File file(path, Hdf5File::Mode::kCreate);
    const std::vector<uint16_t> tokens(parts.tokens.begin(), parts.tokens.end());
    file.write<uint16_t>("train/tokens", tokens, {std::ssize(tokens)});
    const auto put = [&](const std::string& name, const Values& values) {
      file.write<int64_t>("train/" + name, values, {std::ssize(values)});
    };
    put("examples", parts.starts), put("prompts", parts.prompts), put("labels", parts.labels);
    if (!parts.groups.empty()) put("groups", parts.groups);
    put("bytes", parts.bytes);
    file.set_attribute("format", parts.format);
    file.set_attribute("format_version", parts.version);
    file.set_attribute("name", std::string("tiny"));
    file.set_attribute("task", parts.task);
    file.set_attribute("class_names", parts.class_names);
    file.set_attribute("tokenizer", parts.tokenizer);
    file.set_attribute("vocab_size", parts.vocab_size);
    file.set_attribute("end_of_document", int64_t{256});
    file.set_attribute("fingerprint", parts.fingerprint.empty() ? examples_fingerprint(file) : parts.fingerprint);
    return path;
  }
  ExampleDataset open(const ExampleParts& parts) { return ExampleDataset::open(write(parts), "train"); }

  /// The message of the UserError that opening must end with, after the parts were spoilt.
  std::string refusal(ExampleParts parts, const std::function<void(ExampleParts&)>& spoil,
                      const std::string& split = "train", const std::string& tokenizer = "") {
    spoil(parts);
    try {
      ExampleDataset::open(write(parts), split, tokenizer);
    } catch (const core::UserError& error) {
      EXPECT_FALSE(error.hint().empty());
      return error.what();
    }
    return "it was opened";
  }

  TemporaryDirectory folder_;
};

TEST_F(ExampleDatasetTest, ReadsTextsWithTheirClass) {
  const ExampleDataset set = open(classification());
  EXPECT_EQ(set.info().name, "tiny");
  EXPECT_EQ(set.info().task, "classification");
  EXPECT_EQ(set.info().class_names, (std::vector<std::string>{"no", "yes"}));
  EXPECT_EQ(set.size(), 3);
  EXPECT_EQ(set.groups(), 3);
  EXPECT_EQ(set.group(1), std::pair(int64_t{1}, int64_t{2}));
  EXPECT_EQ(set.labels(), (Values{1, 0, 1}));
  const Example last = set.at(2);
  EXPECT_EQ(last.tokens, (Values{'d', 'e', 'f'}));
  EXPECT_EQ(set.length(2), 3);
  EXPECT_EQ(last.prompt, 3);
  EXPECT_EQ(last.label, 1);
  EXPECT_EQ(last.group, -1);
}

TEST_F(ExampleDatasetTest, ReadsPromptsWithTheirCompletion) {
  const Example second = open(completion()).at(1);
  EXPECT_EQ(second.tokens, (Values{'c', 'd', 'e', 256}));
  EXPECT_EQ(second.prompt, 2);
  EXPECT_EQ(second.label, -1);
  EXPECT_EQ(second.bytes, 1);
}

TEST_F(ExampleDatasetTest, ReadsTheChoicesOfAQuestionTogether) {
  const ExampleDataset set = open(choice());
  EXPECT_EQ(set.size(), 5);
  EXPECT_EQ(set.groups(), 2);
  EXPECT_EQ(set.group(0), std::pair(int64_t{0}, int64_t{2}));
  EXPECT_EQ(set.group(1), std::pair(int64_t{2}, int64_t{5}));
  EXPECT_EQ(set.at(4).group, 1);
  EXPECT_EQ(set.at(4).bytes, 2);
  EXPECT_EQ(set.at(2).label, 1);
}

TEST_F(ExampleDatasetTest, RefusesAnotherFormatVersionTokenizerOrSplit) {
  using P = ExampleParts;
  const auto intact = [](P&) {};
  EXPECT_THAT(refusal(choice(), [](P& p) { p.format = "moraine-text-domain"; }), HasSubstr("not a file of examples"));
  EXPECT_THAT(refusal(choice(), [](P& p) { p.version = 2; }), HasSubstr("version 2"));
  EXPECT_THAT(refusal(choice(), [](P& p) { p.task = "guessing"; }), HasSubstr("unknown task 'guessing'"));
  EXPECT_THAT(refusal(choice(), [](P& p) { p.tokenizer = ""; }), HasSubstr("tokenizer"));
  EXPECT_THAT(refusal(choice(), intact, "test"), HasSubstr("no split 'test'"));
  EXPECT_THAT(refusal(choice(), intact, "train", "hf:0"), HasSubstr("made with another tokenizer"));
  EXPECT_THAT(refusal(choice(), [](P& p) { p.fingerprint = std::string(64, '0'); }), HasSubstr("fingerprint"));
  EXPECT_THAT(refusal(classification(), [](P& p) { p.class_names = "[]"; }), HasSubstr("class_names"));
  EXPECT_THAT(refusal(classification(), [](P& p) { p.class_names = "[1, 2]"; }), HasSubstr("no list of names"));
  EXPECT_THAT(refusal(completion(), [](P& p) { p.class_names = R"(["a","b"])"; }), HasSubstr("class_names"));
}

TEST_F(ExampleDatasetTest, RefusesPartsThatContradictEachOther) {
  using P = ExampleParts;
  EXPECT_THAT(refusal(completion(), [](P& p) { p.starts = {0, 3, 6}; }), HasSubstr("do not cover the tokens"));
  EXPECT_THAT(refusal(completion(), [](P& p) { p.starts = {0, 0, 7}; }), HasSubstr("do not cover the tokens"));
  EXPECT_THAT(refusal(completion(), [](P& p) { p.prompts = {1}; }), HasSubstr("prompts do not fit"));
  EXPECT_THAT(refusal(completion(), [](P& p) { p.bytes = {1}; }), HasSubstr("bytes do not fit"));
  EXPECT_THAT(refusal(completion(), [](P& p) { p.prompts[0] = 0; }),
              HasSubstr("example 0: prompt 0 is outside [1, 3)"));
  EXPECT_THAT(refusal(completion(), [](P& p) { p.prompts[1] = 4; }),
              HasSubstr("example 1: prompt 4 is outside [1, 4)"));
  EXPECT_THAT(refusal(completion(), [](P& p) { p.labels[1] = 0; }), HasSubstr("label 0 does not fit"));
  EXPECT_THAT(refusal(completion(), [](P& p) { p.bytes[1] = -1; }), HasSubstr("bytes are negative"));
  EXPECT_THAT(refusal(completion(), [](P& p) { p.vocab_size = 256; }), HasSubstr("256"));
  EXPECT_THAT(refusal(completion(), [](P& p) { p.groups = {0, 0}; }), HasSubstr("groups do not fit"));
  EXPECT_THAT(refusal(classification(), [](P& p) { p.labels[1] = 2; }), HasSubstr("label 2 is outside the 2 classes"));
  EXPECT_THAT(refusal(classification(), [](P& p) { p.labels[1] = -1; }), HasSubstr("label -1 is outside"));
  EXPECT_THAT(refusal(classification(), [](P& p) { p.prompts[0] = 1; }), HasSubstr("not the whole text"));
  EXPECT_THAT(
      refusal(classification(), [](P& p) { p.tokens.clear(), p.starts = {0}, p.prompts = p.labels = p.bytes = {}; }),
      HasSubstr("holds no examples"));
}

TEST_F(ExampleDatasetTest, RefusesQuestionsWithoutExactlyOneRightChoice) {
  using P = ExampleParts;
  EXPECT_THAT(refusal(choice(), [](P& p) { p.labels[0] = 1; }), HasSubstr("question 0: 2 right choices"));
  EXPECT_THAT(refusal(choice(), [](P& p) { p.labels[2] = 0; }), HasSubstr("question 1: 0 right choices"));
  EXPECT_THAT(refusal(choice(), [](P& p) { p.labels[2] = 2; }), HasSubstr("label 2 does not fit"));
  EXPECT_THAT(refusal(choice(), [](P& p) { p.groups = {0, 0, 1, 1, 2}; }), HasSubstr("question 2: a single choice"));
  EXPECT_THAT(refusal(choice(), [](P& p) { p.groups = {0, 0, 2, 2, 2}; }), HasSubstr("groups are not 0, 1"));
  EXPECT_THAT(refusal(choice(), [](P& p) { p.groups = {1, 1, 0, 0, 0}; }), HasSubstr("groups are not 0, 1"));
  EXPECT_THAT(refusal(choice(), [](P& p) { p.groups.clear(); }), HasSubstr("groups do not fit"));
}

TEST_F(ExampleDatasetTest, ASpoiltFileIsRefusedOrRead) {
  for (const ExampleParts& parts : {classification(), completion(), choice()}) {
    for (uint64_t seed = 0; seed < 150; ++seed) {
      const auto path = write(parts);
      fuzz::Random random(seed);
      fuzz::mutate_hdf5(path, random);
      try {
        const ExampleDataset set = ExampleDataset::open(path, "train");
        for (int64_t index = 0; index < set.size(); ++index)
          EXPECT_EQ(std::ssize(set.at(index).tokens), set.length(index)) << parts.task << ", seed " << seed;
      } catch (const core::UserError& error) {
        EXPECT_FALSE(error.hint().empty()) << error.what();
      } catch (const core::IoError&) {
      }
    }
  }
}

// Files that scripts/prepare_examples.py made, against an expectation that Python computed from the documented rules.
TEST_F(ExampleDatasetTest, ReadsWhatThePreparationWrote) {
  const std::string command = fmt::format("'{}' '{}/tests/data/example_fixtures.py' '{}'", MORAINE_PYTHON,
                                          MORAINE_SOURCE_DIR, (folder_ / "").string());
  const int status = std::system(command.c_str());
  if (WIFEXITED(status) && WEXITSTATUS(status) == 77)
    GTEST_SKIP() << "Python packages h5py, numpy or tokenizers are missing: run scripts/setup";
  ASSERT_EQ(status, 0) << command;
  const core::Json expected = core::read_json(folder_ / "expected.json");
  for (const auto& [name, file] : expected.items()) {
    for (const auto& [split, examples] : file.at("splits").items()) {
      const auto set = ExampleDataset::open(folder_ / (name + ".h5"), split, file.at("tokenizer"));
      EXPECT_EQ(set.info().task, file.at("task"));
      EXPECT_EQ(set.info().class_names, file.at("class_names").get<std::vector<std::string>>());
      ASSERT_EQ(set.size(), std::ssize(examples)) << name << " " << split;
      for (int64_t index = 0; index < set.size(); ++index) {
        const Example example = set.at(index);
        const core::Json found = {{"tokens", example.tokens},
                                  {"prompt", example.prompt},
                                  {"label", example.label},
                                  {"group", example.group},
                                  {"bytes", example.bytes}};
        EXPECT_EQ(found, examples.at(static_cast<size_t>(index))) << name << " " << split << " " << index;
      }
    }
  }
}

}  // namespace
}  // namespace moraine::data
