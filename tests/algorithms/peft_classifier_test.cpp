// An adapter with a classifier that was trained beside it, as PEFT keeps both (scripts/make_lora_golden.py).
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "algorithms/adapters/adapter.h"
#include "algorithms/objectives/head.h"
#include "core/error.h"
#include "core/file.h"
#include "models/bert.h"
#include "models/open_backbone.h"
#include "models/tensor_io.h"
#include "tests/models/random_tensors.h"
#include "tests/temporary_directory.h"

namespace moraine::algorithms::adapters {
namespace {

using testing::HasSubstr;

const std::filesystem::path kGolden =
    std::filesystem::path(MORAINE_SOURCE_DIR) / "tests/algorithms/golden/bert_seq_cls";
const models::ClassifierForm kForm{"BertForSequenceClassification", "bert.", "classifier"};

/// The golden classifier's file, and its encoder alone.
struct Subject {
  core::Safetensors file =
      core::Safetensors::open(MORAINE_SOURCE_DIR "/tests/models/golden/bert_classifier.safetensors");

  models::Bert encoder() const {
    std::vector<core::TensorView> weights;
    for (core::TensorView view : file.tensors()) {
      if (!view.name.starts_with("weight/")) continue;
      view.name.erase(0, std::string("weight/").size());
      weights.push_back(view);
    }
    const auto config =
        models::BertConfig::from_json(core::parse_json(file.metadata().at("config"), "golden"), "golden");
    return models::Bert::from_tensors(config, weights, "golden", std::nullopt).without_classifier();
  }
  at::Tensor logits(const PeftDirectory& read) const {
    const at::NoGradGuard no_grad;
    models::Bert bert = encoder();
    Adapter::load(read, bert, at::kFloat, at::kCPU).attach(bert);
    const auto head = objectives::Head::start(read.classifier, at::kCPU);
    return head.logits(
        bert.features({.tokens = models::copy_of(*file.find("tokens")), .mask = models::copy_of(*file.find("mask"))}));
  }
};

models::ModelFacts facts_of_width(int64_t width) {
  models::ModelFacts facts;
  facts.width = width;
  facts.classifier = kForm;
  return facts;
}

TEST(PeftClassifier, AdapterAndHeadGiveTheLogitsOfPeft) {
  const Subject subject;
  const PeftDirectory read = read_peft_directory(kGolden, &kForm);
  EXPECT_EQ(read.prefix, "bert.");
  EXPECT_EQ(objectives::Head::classes_of(read.classifier, facts_of_width(16)), 3);
  const auto expected = core::Safetensors::open(kGolden / "logits.safetensors");
  EXPECT_LE(models::relative_error(subject.logits(read), models::copy_of(*expected.find("logits"))), 1e-5);
  for (const auto& [name, tensor] : objectives::Head::start(read.classifier, at::kCPU).tensors())
    EXPECT_TRUE(tensor.is_leaf() && tensor.requires_grad()) << name;
}

TEST(PeftClassifier, WhatIsWrittenIsReadAgain) {
  const Subject subject;
  const PeftDirectory read = read_peft_directory(kGolden, &kForm);
  const models::Bert bert = subject.encoder();
  PeftClassifier classifier{{}, "classifier", "bert.", "SEQ_CLS"};
  for (const auto& view : read.classifier)
    classifier.tensors.emplace_back(view.name.substr(std::string("base_model.model.").size()), models::copy_of(view));
  const TemporaryDirectory directory;
  Adapter::load(read, bert, at::kFloat, at::kCPU).save(directory.path(), "", classifier);
  const PeftDirectory again = read_peft_directory(directory.path(), &kForm);
  EXPECT_TRUE(models::same_bits(subject.logits(again), subject.logits(read)));
  const auto theirs = core::Safetensors::open(kGolden / "adapter_model.safetensors");
  ASSERT_EQ(again.file.tensors().size(), theirs.tensors().size());
  for (const auto& view : theirs.tensors()) {
    const core::TensorView* own = again.file.find(view.name);
    ASSERT_NE(own, nullptr) << view.name;
    EXPECT_TRUE(models::same_bits(models::copy_of(*own), models::copy_of(view))) << view.name;
  }
}

TEST(PeftClassifier, WhatIsNoneOrOfAnotherModelIsRefused) {
  const auto edited = [](const core::Json& changes) {
    auto directory = std::make_unique<TemporaryDirectory>();
    core::Json config = core::read_json(kGolden / "adapter_config.json");
    config.update(changes);
    directory->write("adapter_config.json", config.dump());
    std::filesystem::copy(kGolden / "adapter_model.safetensors", *directory / "adapter_model.safetensors");
    return directory;
  };
  const auto other = edited({{"modules_to_save", {"classifier", "pooler"}}});
  EXPECT_THAT(models::thrown<core::UserError>([&] { (void)read_peft_directory(other->path(), &kForm); }),
              HasSubstr("modules_to_save names \"pooler\""));
  EXPECT_THAT(models::thrown<core::UserError>([&] { (void)read_peft_directory(kGolden); }),
              HasSubstr("modules_to_save"));
  const PeftDirectory read = read_peft_directory(kGolden, &kForm);
  EXPECT_THAT(
      models::thrown<core::UserError>([&] { (void)objectives::Head::classes_of(read.classifier, facts_of_width(20)); }),
      HasSubstr("classifier.weight [3, 16]"));
  models::ModelFacts without = facts_of_width(16);
  without.classifier.bias = false;
  EXPECT_THROW((void)objectives::Head::classes_of(read.classifier, without), core::UserError);
  EXPECT_EQ(objectives::Head::classes_of({}, without), 0);
  // Names of ends alone stay as they are.
  const auto ends = edited({{"target_modules", {"query", "value"}}, {"rank_pattern", {{"1.attention.self.query", 2}}}});
  EXPECT_EQ(read_peft_directory(ends->path(), &kForm).config.target_modules,
            (std::vector<std::string>{"query", "value"}));
  EXPECT_EQ(read.config.target_modules.size(), 4u);
  EXPECT_EQ(read.config.rank_pattern[0].module, "encoder.layer.1.attention.self.query");
}

}  // namespace
}  // namespace moraine::algorithms::adapters
