#include "data/example_dataset.h"

#include <cstdlib>
#include <functional>
#include <map>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "core/hdf5.h"
#include "data/fingerprint.h"
#include "tests/temporary_directory.h"

namespace moraine::data {
namespace {

using testing::HasSubstr;
using Values = std::vector<int64_t>;

/// What a file holds; a test changes a part of it.
struct Content {
  std::string task = "choice", classes = "[]";
  int64_t vocabulary = 257;
  std::map<std::string, Values> parts = {{"tokens", {10, 11, 1, 256, 10, 11, 2, 3, 256, 20, 4, 256, 20, 5, 256}},
                                         {"examples", {0, 4, 9, 12, 15}},
                                         {"prompts", {2, 2, 1, 1}},
                                         {"labels", {0, 1, 1, 0}},
                                         {"groups", {0, 0, 1, 1}},
                                         {"bytes", {1, 2, 1, 1}}};
};

Content classification() {
  return {"classification",
          R"(["a","b"])",
          20,
          {{"tokens", {1, 2, 3, 4, 5}},
           {"examples", {0, 2, 5}},
           {"prompts", {2, 3}},
           {"labels", {1, 0}},
           {"bytes", {0, 0}}}};
}

class Examples : public testing::Test {
 protected:
  std::filesystem::path write(const Content& content, const std::string& fingerprint = "") {
    const std::filesystem::path path = folder_ / fmt::format("{}.h5", ++files_);
    const auto make = [&](const std::string& claimed) {
      core::Hdf5File file(path, core::Hdf5File::Mode::kCreate);
      for (const auto& [name, values] : content.parts)
        file.write<int64_t>("train/" + name, values, {static_cast<int64_t>(values.size())});
      for (const auto& [key, value] : std::map<std::string, std::string>{{"format", "moraine-text-examples"},
                                                                         {"name", "some"},
                                                                         {"task", content.task},
                                                                         {"class_names", content.classes},
                                                                         {"tokenizer", "bytes-v1"},
                                                                         {"fingerprint", claimed}})
        file.set_attribute(key, value);
      file.set_attribute("format_version", int64_t{1});
      file.set_attribute("vocab_size", content.vocabulary);
      file.close();
    };
    make(std::string(64, '0'));
    make(fingerprint.empty() ? examples_fingerprint(core::Hdf5File(path, core::Hdf5File::Mode::kRead)) : fingerprint);
    return path;
  }
  std::string refusal(const Content& content) {
    const auto path = write(content);
    try {
      (void)ExampleDataset::open(path, "train");
    } catch (const core::UserError& error) {
      return error.what();
    }
    return "";
  }

  TemporaryDirectory folder_;
  int files_ = 0;
};

TEST_F(Examples, OfAChoiceStandByQuestion) {
  const auto dataset = ExampleDataset::open(write({}), "train", "bytes-v1");
  EXPECT_EQ(dataset.info().task, "choice");
  EXPECT_EQ(dataset.size(), 4);
  EXPECT_EQ(dataset.groups(), 2);
  EXPECT_EQ(dataset.group(1), std::pair(int64_t{2}, int64_t{4}));
  EXPECT_EQ(dataset.labels(), (Values{0, 1, 1, 0}));
  const Example example = dataset.at(1);
  EXPECT_EQ(example.tokens, (Values{10, 11, 2, 3, 256}));
  EXPECT_EQ(example.prompt, 2);
  EXPECT_EQ(example.label, 1);
  EXPECT_EQ(example.group, 0);
  EXPECT_EQ(example.bytes, 2);
  EXPECT_EQ(dataset.length(1), 5);
}

TEST_F(Examples, OfAClassificationAreQuestionsOfTheirOwn) {
  const auto dataset = ExampleDataset::open(write(classification()), "train");
  EXPECT_EQ(dataset.info().class_names, (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(dataset.groups(), 2);
  EXPECT_EQ(dataset.group(1), std::pair(int64_t{1}, int64_t{2}));
  EXPECT_EQ(dataset.at(1).tokens, (Values{3, 4, 5}));
  EXPECT_EQ(dataset.at(0).label, 1);
}

TEST_F(Examples, ThatContradictEachOtherAreRefusedByName) {
  const auto changed = [&](Content content, const std::string& part, const Values& values) {
    content.parts[part] = values;
    return refusal(content);
  };
  EXPECT_EQ(refusal({}), "");
  EXPECT_THAT(changed({}, "examples", {0, 4, 4, 12, 15}), HasSubstr("do not cover the tokens"));
  EXPECT_THAT(changed({}, "examples", {0, 4, 9, 12, 14}), HasSubstr("do not cover the tokens"));
  EXPECT_THAT(changed({}, "prompts", {2, 2, 1}), HasSubstr("not as many as the examples"));
  EXPECT_THAT(changed({}, "prompts", {2, 5, 1, 1}), HasSubstr("example 1 of 5 tokens with a prompt of 5"));
  EXPECT_THAT(changed({}, "prompts", {0, 2, 1, 1}), HasSubstr("prompt of 0"));
  EXPECT_THAT(changed({}, "bytes", {1, -2, 1, 1}), HasSubstr("-2 bytes"));
  EXPECT_THAT(changed({}, "labels", {0, 0, 1, 0}), HasSubstr("question 0 has 2 choices, 0 of them right"));
  EXPECT_THAT(changed({}, "labels", {1, 1, 1, 0}), HasSubstr("2 of them right"));
  EXPECT_THAT(changed({}, "groups", {0, 0, 1, 2}), HasSubstr("question 1 has 1 choices"));
  EXPECT_THAT(changed({}, "groups", {1, 1, 2, 2}), HasSubstr("question 1"));
  EXPECT_THAT(changed(classification(), "labels", {1, 2}), HasSubstr("label 2 among 2 classes"));
  EXPECT_THAT(changed(classification(), "prompts", {2, 2}), HasSubstr("prompt of 2"));
  Content content = classification();
  content.classes = R"(["a"])";
  EXPECT_THAT(refusal(content), HasSubstr("'classification' with 1 classes"));
  content.classes = "{}";
  EXPECT_THAT(refusal(content), HasSubstr("no list of names"));
  content = classification();
  content.task = "regression";
  EXPECT_THAT(refusal(content), HasSubstr("'regression'"));
}

TEST_F(Examples, TokensOutsideTheVocabularyAreRefusedWhenRead) {
  Content content;
  content.vocabulary = 256;
  const auto dataset = ExampleDataset::open(write(content), "train");
  EXPECT_THROW((void)dataset.at(0), core::UserError);
}

TEST_F(Examples, OtherContentTokenizersAndSplitsAreRefused) {
  EXPECT_THROW((void)ExampleDataset::open(write({}, std::string(64, 'a')), "train"), core::UserError);
  EXPECT_THROW((void)ExampleDataset::open(write({}), "train", "hf:other"), core::UserError);
  EXPECT_THROW((void)ExampleDataset::open(write({}), "test"), core::UserError);
  EXPECT_THROW((void)ExampleDataset::open(folder_ / "none.h5", "train"), core::UserError);
}

// What scripts/prepare_examples.py writes is what the reader reads, fingerprint included.
TEST_F(Examples, OfTheScriptAreRead) {
  const auto records = folder_.write("a.jsonl", [] {
    std::string lines;
    for (int i = 0; i < 60; ++i)
      lines +=
          fmt::format("{{\"question\": \"ä {}\", \"choices\": [\"{}\", \"none\"], \"answer\": {}}}\n", i, i, i % 2);
    return lines;
  }());
  const std::string command =
      fmt::format("'{}' '{}/scripts/prepare_examples.py' choice --name q --out '{}' '{}' > '{}' 2>&1", MORAINE_PYTHON,
                  MORAINE_SOURCE_DIR, (folder_ / "q.h5").string(), records.string(), (folder_ / "log").string());
  if (std::system(command.c_str()) != 0) GTEST_SKIP() << "Python packages are missing: run scripts/setup";
  int64_t questions = 0;
  for (const char* split : {"train", "validation", "test"}) {
    const auto dataset = ExampleDataset::open(folder_ / "q.h5", split);
    questions += dataset.groups();
    const Example example = dataset.at(0);
    EXPECT_EQ(example.tokens.back(), 256);
    EXPECT_EQ(example.bytes, static_cast<int64_t>(example.tokens.size()) - example.prompt - 1);
  }
  EXPECT_EQ(questions, 60);
}

}  // namespace
}  // namespace moraine::data
