// Learners of continual runs on images and texts: relations that all obey, and what each computes against plain loops.
#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include <gtest/gtest.h>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_solve.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include "algorithms/continual/er/er.h"
#include "algorithms/continual/ewc/ewc.h"
#include "algorithms/continual/head.h"
#include "algorithms/continual/lwf/lwf.h"
#include "algorithms/continual/o_lora/o_lora.h"
#include "algorithms/continual/ranpac/ranpac.h"
#include "algorithms/objectives/examples.h"
#include "data/example_dataset.h"
#include "data/task_stream.h"
#include "models/open_backbone.h"
#include "models/tensor_io.h"
#include "tests/algorithms/continual_world.h"
#include "tests/models/random_tensors.h"

namespace moraine::algorithms {
namespace {

using continual::RanPacSums;

constexpr const char* kImages = R"(
name: tiny
method: continual
model: {architecture: {image_size: 4, patch_size: 2, hidden_size: 8, intermediate_size: 12, num_layers: 1, num_heads: 2}}
images: {path: images.h5}
stream: {increment: 2, train_per_class: 10}
train: {steps: 4, batch_size: 8, micro_batch_size: 4, learning_rate: 3e-3}
learners: {seq_lora: {adapter: {rank: 2}}, o_lora: {adapter: {rank: 2}}, ewc: {samples: 7}, er: {buffer_size: 9}, ranpac: {features: 12}}
)";
constexpr const char* kTexts = R"(
name: tiny
method: continual
model: {path: bert}
texts: {path: texts.h5}
stream: {increment: 2, train_per_class: 10}
train: {steps: 4, batch_size: 8, micro_batch_size: 4, learning_rate: 3e-3}
learners: {seq_lora: {adapter: {rank: 2}}, o_lora: {adapter: {rank: 2}}, ewc: {samples: 7}, er: {buffer_size: 9}, ranpac: {features: 12}}
)";

class Learners : public ContinualWorld {
 protected:
  Learners() {
    write_texts("texts.h5", 6, 11);
    write_bert("bert");
  }
  std::map<std::string, Unit> run_on(const char* recipe, const std::vector<std::string>& overrides) {
    folder_.write("recipe.yaml", recipe);
    return run(overrides);
  }
  core::ArtefactPtr result_of(const std::map<std::string, Unit>& units, const std::string& label) const {
    return results_.at(units.at(label).id());
  }
  static at::Tensor tensor(const core::Artefact& artefact, const std::string& name) {
    return models::copy_of(*artefact.file().find(name));
  }
  // Whether the trained tensors of two artefacts are the same numbers.
  static bool same_numbers(const core::Artefact& a, const core::Artefact& b) {
    for (const auto& view : a.file().tensors()) {
      const auto* other = b.file().find(view.name);
      if (other == nullptr || !models::copy_of(view).equal(models::copy_of(*other))) return false;
    }
    return true;
  }
  // The frozen BERT's features of training texts, one by one, in float64: [rows, d].
  at::Tensor features(const std::vector<int64_t>& rows) {
    const at::NoGradGuard no_grad;
    const auto model = models::open_backbone(folder_ / "bert", at::kFloat, std::nullopt);
    const auto texts = data::ExampleDataset::open(folder_ / "texts.h5", "train");
    std::vector<at::Tensor> out;
    for (const int64_t row : rows) {
      const std::vector<data::Example> one = {texts.at(row)};
      out.push_back(model->features(objectives::texts(one, at::kCPU))[0].to(at::kDouble));
    }
    return at::stack(out);
  }
  data::TaskStream stream() {
    const auto train = data::ExampleDataset::open(folder_ / "texts.h5", "train");
    const auto test = data::ExampleDataset::open(folder_ / "texts.h5", "test");
    return data::TaskStream::make(
        data::LabelledSet{train.info().fingerprint, train.info().class_names, train.labels(), test.labels(), "texts"},
        {.increment = 2, .train_per_class = 10, .seed = 1});
  }
};

TEST_F(Learners, AllRunOnImagesAndOnTextsAndObeyTheRelationsOfTheirSettings) {
  const std::string methods =
      "methods=[joint, finetune, finetune_local, seq_lora, seq_lora_local, o_lora, linear_probe, ewc, lwf, er, "
      "simplecil, ranpac]";
  for (const char* recipe : {kImages, kTexts}) {
    const auto units = run_on(recipe, {methods});
    std::set<std::string> seen;
    for (const auto& [label, unit] : units) {
      if (unit.kind != "evaluate") continue;
      const auto after = unit.spec.at("after").get<int64_t>();
      const core::Json cell = tested(units, label);
      seen.insert(label.substr(5, label.find('/', 5) - 5));
      for (int64_t j = 0; j <= after; ++j) {
        const core::Json& own = cell.at(static_cast<size_t>(j));
        EXPECT_GE(own.at("task_incremental").get<int64_t>(), own.at("class_incremental").get<int64_t>()) << label;
      }
    }
    EXPECT_EQ(seen.size(), 12u);
  }
}

// Classes of every file are its own; a stream of one file's classes is the same as that file among others, left aside.
TEST_F(Learners, TasksMayHaveFilesOfTheirOwn) {
  write_texts("three.h5", 3, 12);
  write_texts("two.h5", 2, 13);
  const std::vector<std::string> files = {"texts=null", "stream.tasks=[{path: " + (folder_ / "three.h5").string() +
                                                            "}, {path: " + (folder_ / "two.h5").string() + "}]"};
  auto overrides = files;
  overrides.insert(overrides.end(), {"methods=[finetune, simplecil]", "orders=[-1, 2]"});
  const auto units = run_on(kTexts, overrides);
  const core::Json streams = recipe_.method->inputs().at("streams");
  EXPECT_EQ(streams[0].at("tasks")[0].at("classes"), core::Json({0, 1, 2}));
  EXPECT_EQ(streams[0].at("tasks")[1].at("classes"), core::Json({3, 4}));
  EXPECT_EQ(streams[1].at("tasks")[0].at("classes"), core::Json({3, 4})) << "numpy's permutation of 2 by seed 2: 1, 0";
  EXPECT_EQ(streams[0].at("tasks")[1].at("test"), 10);
  EXPECT_EQ(recipe_.method->inputs().at("class_names")[3], "tiny/c0");
  const auto restored = find_method("continual").restore(recipe_.values, recipe_.method->inputs());
  EXPECT_TRUE(restored->plan(*this).pending.empty());
  EXPECT_EQ(tensor(*result_of(units, "train/simplecil/class4"), "prototype").numel(), 8);
  // The mean of class 4 is that of the second file's class 1. A run forgets the results of the run before it.
  const auto mean_in = [&](const std::vector<std::string>& settings, const char* label) {
    return tensor(*result_of(run_on(kTexts, settings), label), "prototype");
  };
  const at::Tensor alone = mean_in({"methods=[simplecil]", "texts.path=" + (folder_ / "two.h5").string(),
                                    "stream.increment=1", "stream.train_per_class=0"},
                                   "train/simplecil/class1");
  EXPECT_TRUE(mean_in({"methods=[simplecil]", files[0], files[1], "stream.train_per_class=0"}, "train/simplecil/class4")
                  .equal(alone));
}

TEST_F(Learners, AdaptersOfEveryKindGoThroughAStream) {
  for (const char* type : {"lora", "dora", "vera", "nola", "ia3", "adaptertune"}) {
    std::string recipe = kTexts;
    const std::string plain = "{rank: 2}";
    const bool ranked = adapters::parametrisation(type).traits().uses_rank;
    recipe.replace(recipe.find(plain), plain.size(), fmt::format("{{type: {}{}}}", type, ranked ? ", rank: 2" : ""));
    const auto units = run_on(recipe.c_str(), {"methods=[seq_lora]"});
    const auto first = result_of(units, "train/seq_lora/order-1/seed1/task0");
    const auto last = result_of(units, "train/seq_lora/order-1/seed1/task2");
    EXPECT_FALSE(same_numbers(*first, *last)) << type << " is not trained";
    EXPECT_EQ(last->meta().at("classes").size(), 6u) << type;
  }
}

TEST_F(Learners, WithoutTheirPenaltyTheyAreFineTuning) {
  const auto units =
      run_on(kTexts, {"methods=[finetune, ewc, lwf]", "learners.ewc.strength=0", "learners.lwf.strength=0"});
  for (int64_t task = 0; task < 3; ++task) {
    const std::string at = "/order-1/seed1/task" + std::to_string(task);
    const auto finetuned = result_of(units, "train/finetune" + at);
    EXPECT_TRUE(same_numbers(*finetuned, *result_of(units, "train/ewc" + at))) << task;
    EXPECT_TRUE(same_numbers(*finetuned, *result_of(units, "train/lwf" + at))) << task;
  }
}

// Of what is held back, importance times squared distance, less is left than by training without the penalty.
TEST_F(Learners, PenaltiesHoldTheModelBack) {
  // Adam moves every number by about the rate, whatever the loss: SGD shows its size.
  const std::vector<std::string> sgd = {"train.optimizer=sgd", "train.learning_rate=0.05", "train.clip_norm=0",
                                        "train.steps=40"};
  core::ArtefactPtr importance;
  std::map<std::string, double> held_back;
  for (const std::string method : {"ewc", "finetune"}) {
    std::vector<std::string> overrides = {"methods=[" + method + "]", "learners.ewc.strength=10"};
    overrides.insert(overrides.end(), sgd.begin(), sgd.end());
    const auto units = run_on(kTexts, overrides);
    const std::string run = "train/" + method + "/order-1/seed1/";
    if (!importance) importance = result_of(units, run + "importance0");
    models::NamedTensors values, anchors, weights;
    for (const auto& view : importance->file().tensors()) {
      const auto after = [&](const char* task) {
        const at::Tensor whole = tensor(*result_of(units, run + task), view.name);
        return view.name.starts_with("head.") ? whole.narrow(0, 0, view.shape[0]) : whole;
      };
      values.emplace_back(view.name, after("task1")), anchors.emplace_back(view.name, after("task0"));
      weights.emplace_back(view.name, models::copy_of(view));
    }
    held_back[method] = continual::ewc_penalty(values, anchors, weights).item<double>();
  }
  EXPECT_LT(held_back["ewc"], held_back["finetune"]);
}

// d loss / d W[c] = (p[c] - y[c]) f for one example: the head's importance is the mean of its square.
TEST_F(Learners, ImportanceIsTheMeanSquareOfTheExamplesGradients) {
  const auto units = run_on(kTexts, {"methods=[ewc]", "learners.ewc.samples=1000", "train.steps=1",
                                     "learners.ewc.adapter={rank: 2}", "train.learning_rate=1e-9"});
  // With a rate of nearly nothing the adapter stays the base, and the features those of the frozen model.
  const data::TaskStream own = stream();
  const auto train = data::ExampleDataset::open(folder_ / "texts.h5", "train");
  at::Tensor expected_before;
  for (int64_t task = 0; task < 2; ++task) {
    const auto& rows = own.tasks[static_cast<size_t>(task)].train;
    const auto model = result_of(units, "train/ewc/order-1/seed1/task" + std::to_string(task));
    const auto importance = result_of(units, "train/ewc/order-1/seed1/importance" + std::to_string(task));
    const at::Tensor f = features(rows), w = tensor(*model, "head.weight").to(at::kDouble),
                     b = tensor(*model, "head.bias").to(at::kDouble);
    const at::Tensor p = at::linear(f, w, b).softmax(-1);
    at::Tensor residual = p.clone();
    const auto classes = model->meta().at("classes").get<std::vector<int64_t>>();
    for (size_t i = 0; i < rows.size(); ++i) {
      const int64_t label = train.labels()[static_cast<size_t>(rows[i])];
      residual[static_cast<int64_t>(i)][std::ranges::find(classes, label) - classes.begin()] -= 1;
    }
    at::Tensor expected = at::matmul((residual * residual).t(), f * f) / static_cast<double>(rows.size());
    if (task > 0) expected.narrow(0, 0, 2).add_(expected_before);
    EXPECT_LT(models::relative_error(tensor(*importance, "head.weight"), expected), 1e-4) << task;  // float32 features
    EXPECT_EQ(importance->meta().at("examples"), rows.size());
    expected_before = expected;
  }
}

TEST(EwcPenalty, IsTheWeightedSquareOfTheChange) {
  const at::Tensor value = models::random_tensor({3, 2}, 1), anchor = models::random_tensor({3, 2}, 2),
                   importance = models::random_tensor({3, 2}, 3).abs();
  double expected = 0;
  for (int64_t i = 0; i < 3; ++i)
    for (int64_t j = 0; j < 2; ++j)
      expected += importance[i][j].item<double>() * std::pow((value - anchor)[i][j].item<double>(), 2);
  const at::Tensor sum = continual::ewc_penalty({{"a", value}, {"b", value}}, {{"a", anchor}, {"b", anchor}},
                                                {{"a", importance}, {"b", importance}});
  EXPECT_NEAR(sum.item<double>(), 2 * expected, 1e-9);
}

TEST(Overlap, IsTheSumOfAbsoluteInnerProducts) {
  const at::Tensor old = models::random_tensor({2, 5}, 1), fresh = models::random_tensor({3, 5}, 2);
  double expected = 0;
  for (int64_t i = 0; i < 2; ++i)
    for (int64_t j = 0; j < 3; ++j) {
      double inner = 0;
      for (int64_t k = 0; k < 5; ++k) inner += old[i][k].item<double>() * fresh[j][k].item<double>();
      expected += std::abs(inner);
    }
  EXPECT_NEAR(continual::overlap({{"a", old}, {"b", old}}, {{"a", fresh}, {"b", fresh}}).item<double>(), 2 * expected,
              1e-12);
}

// Later LoRAs with a strong penalty read other directions than with none; all of them stay as they were trained.
TEST_F(Learners, LorasOfTasksAreKeptApart) {
  const auto overlap_after = [&](const std::string& strength) {
    const auto units = run_on(kTexts, {"methods=[o_lora]", "learners.o_lora.strength=" + strength, "train.steps=30",
                                       "train.learning_rate=0.02"});
    models::NamedTensors first, second;
    for (const auto& view : result_of(units, "train/o_lora/order-1/seed1/task0")->file().tensors())
      if (view.name.ends_with("lora_A.weight")) first.emplace_back(view.name, models::copy_of(view));
    for (const auto& [name, a] : first)
      second.emplace_back(name, tensor(*result_of(units, "train/o_lora/order-1/seed1/task1"), name));
    EXPECT_EQ(units.at("test/o_lora/order-1/seed1/after2").spec.at("parts"), 3);
    return continual::overlap(first, second).item<double>();
  };
  EXPECT_LT(overlap_after("10"), 0.7 * overlap_after("0"));
}

TEST(Distillation, IsTheCrossEntropyOfSoftenedScores) {
  const at::Tensor now = models::random_tensor({4, 3}, 1), old = models::random_tensor({4, 3}, 2);
  double expected = 0;
  for (int64_t row = 0; row < 4; ++row) {
    double norm_now = 0, norm_old = 0;
    for (int64_t c = 0; c < 3; ++c) {
      norm_now += std::exp(now[row][c].item<double>() / 2);
      norm_old += std::exp(old[row][c].item<double>() / 2);
    }
    for (int64_t c = 0; c < 3; ++c)
      expected -=
          std::exp(old[row][c].item<double>() / 2) / norm_old * (now[row][c].item<double>() / 2 - std::log(norm_now));
  }
  EXPECT_NEAR(continual::distillation(now, old, 2).item<double>(), expected, 1e-9);
}

TEST(Buffer, IsBalancedPureAndShrinksIntoItself) {
  std::vector<int64_t> labels, first, all;
  for (int64_t row = 0; row < 60; ++row) {
    labels.push_back(row % 5);
    if (row % 5 < 3) first.push_back(row);
    all.push_back(row);
  }
  const auto old = continual::balanced_buffer(first, labels, 10, 7);
  ASSERT_EQ(old.size(), 10u);
  std::map<int64_t, int> counts;
  for (const int64_t row : old) ++counts[labels[static_cast<size_t>(row)]];
  EXPECT_EQ(counts, (std::map<int64_t, int>{{0, 4}, {1, 3}, {2, 3}}));
  EXPECT_EQ(continual::balanced_buffer(first, labels, 10, 7), old);
  EXPECT_NE(continual::balanced_buffer(first, labels, 10, 8), old);
  // What is drawn later out of the buffer and new rows is what would be drawn out of all rows.
  std::vector<int64_t> known = old;
  for (const int64_t row : all)
    if (row % 5 >= 3) known.push_back(row);
  EXPECT_EQ(continual::balanced_buffer(known, labels, 10, 7), continual::balanced_buffer(all, labels, 10, 7));
  EXPECT_EQ(continual::balanced_buffer(first, labels, 100, 7), first) << "no more than there are";
}

// The first task has nothing to hold on to; from the second on distillation and replay make another model.
TEST_F(Learners, DistillationAndReplayBeginWithTheSecondTask) {
  const auto units = run_on(kTexts, {"methods=[finetune, lwf, er]", "learners.lwf.strength=3"});
  const auto trained = [&](const std::string& method, const std::string& task) {
    return tensor(*result_of(units, "train/" + method + "/order-1/seed1/" + task), "head.weight");
  };
  for (const std::string method : {"lwf", "er"}) {
    EXPECT_TRUE(trained(method, "task0").equal(trained("finetune", "task0"))) << method;
    EXPECT_FALSE(trained(method, "task1").equal(trained("finetune", "task1"))) << method;
  }
}

// B of the second LoRA starts at zero, so the head's first step is on features of the BERT with the first one in it.
TEST_F(Learners, ALaterLoraStandsOnTheOnesBeforeIt) {
  const std::vector<std::string> one_step = {
      "methods=[o_lora]",         "train.steps=1",       "train.batch_size=20",
      "train.micro_batch_size=0", "train.optimizer=sgd", "train.learning_rate=0.5",
      "train.schedule=constant",  "train.clip_norm=0",   "learners.o_lora.strength=0"};
  const auto units = run_on(kTexts, one_step);
  const auto first = result_of(units, "train/o_lora/order-1/seed1/task0"),
             second = result_of(units, "train/o_lora/order-1/seed1/task1");
  const at::NoGradGuard no_grad;
  const auto model = models::open_backbone(folder_ / "bert", at::kFloat, std::nullopt)->shared_on(at::kCPU);
  adapters::AdapterConfig config;
  config.rank = 2;
  const auto adapter = adapters::Adapter::create(config, *model, 1, at::kCPU);
  for (const auto& [name, value] : adapter.parameters()) at::Tensor(value).copy_(tensor(*first, "lora." + name));
  adapter.attach(*model);
  const auto texts = data::ExampleDataset::open(folder_ / "texts.h5", "train");
  const auto rows = stream().tasks[1].train;
  ASSERT_EQ(rows.size(), 20u) << "one batch is the whole task, in whatever order";
  std::vector<data::Example> examples;
  std::vector<int64_t> labels;
  for (const int64_t row : rows)
    examples.push_back(texts.at(row)), labels.push_back(texts.labels()[static_cast<size_t>(row)]);
  const at::Tensor f = model->features(objectives::texts(examples, at::kCPU)).to(at::kDouble);
  const auto [weight, bias] =
      continual::Head::read(*first, at::kCPU).rows(stream().classes_until(1), continual::head_seed(1), 8, at::kCPU);
  at::Tensor residual = at::linear(f, weight.to(at::kDouble), bias.to(at::kDouble)).softmax(-1);
  for (size_t i = 0; i < labels.size(); ++i) residual[static_cast<int64_t>(i)][labels[i]] -= 1;
  const at::Tensor expected = weight.to(at::kDouble) - 0.5 * at::matmul(residual.t(), f) / 20;
  EXPECT_LT(models::relative_error(tensor(*second, "head.weight").to(at::kDouble), expected), 1e-5);  // float32 forward
}

TEST_F(Learners, TheBuffersBytesAreThoseOfItsExamples) {
  const auto units = run_on(kTexts, {"methods=[er]"});
  const auto texts = data::ExampleDataset::open(folder_ / "texts.h5", "train");
  for (int64_t task = 0; task < 3; ++task) {
    const auto artefact = result_of(units, "train/er/order-1/seed1/task" + std::to_string(task));
    const at::Tensor rows = tensor(*artefact, "buffer.rows");
    ASSERT_EQ(rows.numel(), 9);
    int64_t bytes = 0;
    for (int64_t i = 0; i < 9; ++i) bytes += 2 * texts.length(rows[i].item<int64_t>());
    EXPECT_EQ(artefact->meta().at("buffer").at("bytes"), bytes);
  }
  const auto costs = recipe_.method->summary(*this).at("tables").back();
  int64_t file = 0;
  const auto last = result_of(units, "train/er/order-1/seed1/task2");
  file = static_cast<int64_t>(last->bytes().size()) + last->meta().at("buffer").at("bytes").get<int64_t>();
  EXPECT_EQ(costs.at("rows").at(0).at("bytes"), file) << costs;
}

// One step of gradient descent from the initial head, in float64.
TEST_F(Learners, TheProbeTrainsTheHeadAlone) {
  const auto units = run_on(
      kTexts, {"methods=[linear_probe]", "train.steps=1", "train.batch_size=20", "train.micro_batch_size=0",
               "train.optimizer=sgd", "train.learning_rate=0.5", "train.schedule=constant", "train.clip_norm=0"});
  const auto& unit = units.at("train/linear_probe/order-1/seed1/task0");
  const auto artefact = results_.at(unit.id());
  EXPECT_EQ(artefact->file().tensors().size(), 2u) << "weight and bias";
  const auto rows = stream().tasks[0].train;  // all 20 of them are one batch
  const auto train = data::ExampleDataset::open(folder_ / "texts.h5", "train");
  const auto [weight, bias] =
      continual::Head{}.rows(std::vector<int64_t>{0, 1}, unit.spec.at("head_seed").get<uint64_t>(), 8, at::kCPU);
  const at::Tensor f = features(rows);
  at::Tensor residual = at::linear(f, weight.to(at::kDouble), bias.to(at::kDouble)).softmax(-1);
  for (size_t i = 0; i < rows.size(); ++i)
    residual[static_cast<int64_t>(i)][train.labels()[static_cast<size_t>(rows[i])]] -= 1;
  const at::Tensor expected = weight.to(at::kDouble) - 0.5 * at::matmul(residual.t(), f) / 20.0;
  EXPECT_LT(models::relative_error(tensor(*artefact, "head.weight"), expected), 1e-5);  // float32
}

// Sums of what workers computed class by class are those of one pass over all examples.
TEST_F(Learners, SumsOfClassesAreThoseOfOnePass) {
  const auto units = run_on(kTexts, {"methods=[ranpac]"});
  const auto sums = result_of(units, "train/ranpac/order-1/sums2");
  const auto classes = sums->meta().at("classes").get<std::vector<int64_t>>();
  ASSERT_EQ(classes.size(), 6u);
  const auto own = stream();
  const auto train = data::ExampleDataset::open(folder_ / "texts.h5", "train");
  std::vector<int64_t> rows;
  for (const auto& task : own.tasks) rows.insert(rows.end(), task.train.begin(), task.train.end());
  const at::Tensor f = features(rows);
  auto generator = at::detail::createCPUGenerator(sums->meta().at("random").at("seed").get<uint64_t>());
  const at::Tensor w = at::empty({8, 12}, at::kFloat).normal_(0, 1, generator).to(at::kDouble);
  const at::Tensor h = at::matmul(f, w).clamp_min(0);
  const at::Tensor gram = tensor(*sums, "gram") + tensor(*sums, "held_gram");
  EXPECT_LT(models::relative_error(gram, at::matmul(h.t(), h)), 1e-6);  // features alone and in batches: float32
  const at::Tensor by_class = tensor(*sums, "sums") + tensor(*sums, "held_sums");
  at::Tensor expected = at::zeros({6, 12}, at::kDouble);
  for (size_t i = 0; i < rows.size(); ++i) {
    const int64_t label = train.labels()[static_cast<size_t>(rows[i])];
    expected[std::ranges::find(classes, label) - classes.begin()] += h[static_cast<int64_t>(i)];
  }
  EXPECT_LT(models::relative_error(by_class, expected), 1e-6);
  // Merged in another order: the same to float64 rounding.
  at::Tensor other = at::zeros({12, 12}, at::kDouble);
  for (int64_t label = 5; label >= 0; --label)
    other += tensor(*result_of(units, "train/ranpac/class" + std::to_string(label)), "gram");
  EXPECT_LT(models::relative_error(other, tensor(*sums, "gram")), 1e-14);
}

RanPacSums sums_of(const at::Tensor& fit, const at::Tensor& fit_labels, const at::Tensor& held,
                   const at::Tensor& held_labels) {
  const auto one_hot = [](const at::Tensor& labels) { return at::eye(3, at::kDouble).index_select(0, labels); };
  return {{0, 1, 2},
          at::matmul(fit.t(), fit),
          at::matmul(one_hot(fit_labels).t(), fit),
          at::matmul(held.t(), held),
          at::matmul(one_hot(held_labels).t(), held)};
}

// The ridge out of sums alone is that of fitting and testing example by example.
TEST(Ridge, IsTheOneThatFitsHeldOutExamplesBest) {
  std::set<double> chosen;
  for (uint64_t seed = 0; seed < 6; ++seed) {
    const double noise = seed < 3 ? 0.1 : 30;
    const at::Tensor labels = at::arange(30, at::kLong).remainder(3),
                     held_labels = at::arange(12, at::kLong).remainder(3);
    const at::Tensor centres = models::random_tensor({3, 8}, 100 + seed);
    const at::Tensor fit = centres.index_select(0, labels) + noise * models::random_tensor({30, 8}, 200 + seed),
                     held = centres.index_select(0, held_labels) + noise * models::random_tensor({12, 8}, 300 + seed);
    const auto error_of = [&](double ridge) {
      const at::Tensor w = at::linalg_solve(at::matmul(fit.t(), fit) + ridge * at::eye(8, at::kDouble),
                                            at::matmul(fit.t(), at::eye(3, at::kDouble).index_select(0, labels)));
      return (at::matmul(held, w) - at::eye(3, at::kDouble).index_select(0, held_labels)).square().sum().item<double>();
    };
    double best = 1e8;
    for (int power = 7; power >= -8; --power)
      if (error_of(std::pow(10.0, power)) < error_of(best)) best = std::pow(10.0, power);
    const RanPacSums sums = sums_of(fit, labels, held, held_labels);
    // Ridges that fit alike may stand for each other; 1e-9 of rounding, sums against rows.
    EXPECT_LE(error_of(continual::best_ridge(sums)), error_of(best) + 1e-9) << seed;
    chosen.insert(best);
    const at::Tensor all = at::cat({fit, held}),
                     y = at::eye(3, at::kDouble).index_select(0, at::cat({labels, held_labels}));
    const at::Tensor expected =
        at::linalg_solve(at::matmul(all.t(), all) + 2.0 * at::eye(8, at::kDouble), at::matmul(all.t(), y));
    EXPECT_LT(models::relative_error(continual::ridge_readout(sums, 2), expected.t()), 1e-10);
  }
  EXPECT_GT(chosen.size(), 1u) << "the data do not tell ridges apart";
}

}  // namespace
}  // namespace moraine::algorithms
