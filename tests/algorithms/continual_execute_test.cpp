// Units of a continual run, executed in this thread on a set of tiny images, against plain loops.
#include <algorithm>
#include <cmath>
#include <map>

#include <gtest/gtest.h>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>

#include "core/error.h"
#include "data/task_stream.h"
#include "models/tensor_io.h"
#include "models/vit.h"
#include "tests/algorithms/continual_world.h"

namespace moraine::algorithms {
namespace {

constexpr const char* kRecipe = R"(
name: tiny
method: continual
model:
  architecture: {image_size: 4, patch_size: 2, hidden_size: 8, intermediate_size: 12, num_layers: 2, num_heads: 2}
  data_path: others.h5
  train: {steps: 3, batch_size: 8, learning_rate: 3e-3}
images: {path: images.h5}
stream: {increment: 2, train_per_class: 10}
orders: [-1, 3]
train: {steps: 6, batch_size: 8, learning_rate: 3e-3}
methods: [joint, finetune, finetune_local, seq_lora, simplecil]
learners: {seq_lora: {adapter: {rank: 2}}}
)";

class ContinualRun : public ContinualWorld {
 protected:
  ContinualRun() {
    std::filesystem::copy_file(folder_ / "images.h5", folder_ / "images_copy.h5");
    std::filesystem::copy_file(folder_ / "others.h5", folder_ / "others_copy.h5");
    folder_.write("recipe.yaml", kRecipe);
  }
};

TEST_F(ContinualRun, CellsObeyTheRelationsOfTheirSettings) {
  const auto units = run();
  int cells = 0;
  for (const auto& [label, unit] : units) {
    if (unit.kind != "evaluate") continue;
    const core::Json cell = tested(units, label);
    const auto after = unit.spec.at("after").get<int64_t>();
    ASSERT_EQ(cell.size(), 3u);
    for (int64_t j = 0; j < 3; ++j) {
      const core::Json& own = cell[static_cast<size_t>(j)];
      EXPECT_EQ(own.at("images"), 10);
      EXPECT_EQ(own.at("class_incremental").is_null(), j > after) << label << " " << j;
      EXPECT_EQ(own.at("task_incremental").is_null(), j > after && label.find("simplecil") != std::string::npos)
          << label << " " << j;
      if (j <= after) {
        EXPECT_GE(own.at("task_incremental").get<int64_t>(), own.at("class_incremental").get<int64_t>()) << label;
      }
      ++cells;
    }
    if (after == 0) {
      EXPECT_EQ(cell[0].at("class_incremental"), cell[0].at("task_incremental"))
          << label << ": with one task both settings are one";
    }
  }
  EXPECT_GT(cells, 60);
}

// The mean feature of every class, the largest cosine, counted in double.
TEST_F(ContinualRun, SimpleCilIsTheNearestClassMean) {
  const auto units = run({"methods=[simplecil]", "orders=[-1]"});
  const auto backbone = results_.at(units.at("train/backbone").id());
  auto vit =
      models::Vit::from_tensors(backbone->meta().at("config"), backbone->file().tensors(), "backbone", at::kFloat);
  const auto dataset = data::ImageDataset::open(folder_ / "images.h5");
  const auto stream = data::TaskStream::make(dataset, {.increment = 2, .train_per_class = 10, .seed = 1});
  const at::NoGradGuard no_grad;
  const auto feature = [&](const std::string& split, int64_t row) {
    std::vector<float> pixels = dataset.batch(split, std::vector<int64_t>{row}, 0.5, 0.5);
    const at::Tensor out =
        vit.features(at::from_blob(pixels.data(), {1, 1, 4, 4}, at::kFloat)).to(at::kDouble).contiguous();
    return std::vector<double>(out.const_data_ptr<double>(), out.const_data_ptr<double>() + out.numel());
  };
  std::map<int64_t, std::vector<double>> sums;  // a cosine does not mind the length of a mean
  for (const auto& task : stream.tasks)
    for (const int64_t row : task.train) {
      auto& sum = sums[dataset.labels("train")[static_cast<size_t>(row)]];
      const auto x = feature("train", row);
      sum.resize(x.size());
      for (size_t i = 0; i < x.size(); ++i) sum[i] += x[i];
    }
  const auto predict = [&](const std::vector<double>& x, const std::vector<int64_t>& among) {
    int64_t best = -1;
    double best_cosine = -2;
    for (const int64_t label : among) {
      double dot = 0, length = 0;
      for (size_t i = 0; i < x.size(); ++i) dot += x[i] * sums[label][i], length += sums[label][i] * sums[label][i];
      if (dot / std::sqrt(length) > best_cosine || best < 0) best_cosine = dot / std::sqrt(length), best = label;
    }
    return best;
  };
  for (int64_t after = 0; after < 3; ++after) {
    const core::Json cells = tested(units, "test/simplecil/order-1/seed1/after" + std::to_string(after));
    for (int64_t j = 0; j <= after; ++j) {
      int64_t among_seen = 0, among_own = 0;
      for (const int64_t row : stream.tasks[static_cast<size_t>(j)].test) {
        const auto x = feature("test", row);
        const int64_t label = dataset.labels("test")[static_cast<size_t>(row)];
        among_seen += predict(x, stream.classes_until(after)) == label;
        among_own += predict(x, stream.tasks[static_cast<size_t>(j)].classes) == label;
      }
      EXPECT_EQ(cells[static_cast<size_t>(j)].at("class_incremental"), among_seen);
      EXPECT_EQ(cells[static_cast<size_t>(j)].at("task_incremental"), among_own);
    }
  }
}

// The class means of the stream in one order are those of the images that another order's stream holds.
TEST_F(ContinualRun, ClassMeansDoNotDependOnTheOrder) {
  const auto units = run({"methods=[simplecil]", "orders=[-1]"});
  const auto backbone = results_.at(units.at("train/backbone").id());
  auto vit =
      models::Vit::from_tensors(backbone->meta().at("config"), backbone->file().tensors(), "backbone", at::kFloat);
  const auto dataset = data::ImageDataset::open(folder_ / "images.h5");
  const auto stream = data::TaskStream::make(dataset, {.increment = 2, .train_per_class = 10, .seed = 1, .order = 3});
  ASSERT_NE(stream.tasks[0].classes, (std::vector<int64_t>{0, 1})) << "the order changes nothing";
  const at::NoGradGuard no_grad;
  std::map<int64_t, at::Tensor> sums;
  std::map<int64_t, int64_t> images;
  for (const auto& task : stream.tasks)
    for (const int64_t row : task.train) {
      std::vector<float> pixels = dataset.batch("train", std::vector<int64_t>{row}, 0.5, 0.5);
      const at::Tensor x = vit.features(at::from_blob(pixels.data(), {1, 1, 4, 4}, at::kFloat))[0].to(at::kDouble);
      const int64_t label = dataset.labels("train")[static_cast<size_t>(row)];
      sums[label] = sums.count(label) ? sums[label] + x : x;
      ++images[label];
    }
  ASSERT_EQ(sums.size(), 6u);
  for (const auto& [label, sum] : sums) {
    const auto artefact = results_.at(units.at(fmt::format("train/simplecil/class{}", label)).id());
    const at::Tensor mean = models::copy_of(*artefact->file().find("prototype")).to(at::kDouble);
    // Features of one image and of a batch differ by float32 rounding of values near one.
    EXPECT_LT((mean - sum / static_cast<double>(images[label])).abs().max().item<double>(), 1e-5) << label;
  }
}

// Every key of a recipe another way, which the recipe of its own process must not bring into a unit it was leased.
TEST_F(ContinualRun, UnitsRunTheirSpecificationWhateverTheWorkersOwnRecipeSays) {
  const std::vector<std::string> keys = {"name=other",
                                         "seed=9",
                                         "workers.local=7",
                                         "images.path=" + (folder_ / "images_copy.h5").string(),
                                         "images.mean=0.1",
                                         "images.deviation=2",
                                         "model.architecture.patch_size=4",
                                         "model.architecture.hidden_size=16",
                                         "model.architecture.intermediate_size=8",
                                         "model.architecture.num_layers=1",
                                         "model.architecture.num_heads=1",
                                         "model.architecture.image_size=8",
                                         "stream.increment=2",
                                         "stream.base_classes=4",
                                         "stream.leave_out=[5]",
                                         "stream.tasks=[{classes: [5, 4, 3]}, {classes: [2, 1, 0]}]",
                                         "stream.train_per_class=3",
                                         "stream.test_per_class=2",
                                         "stream.validation_per_class=2",
                                         "orders=[7]",
                                         "seeds=[5]",
                                         "methods=[joint]",
                                         "train.steps=2",
                                         "train.batch_size=3",
                                         "train.micro_batch_size=2",
                                         "train.optimizer=sgd",
                                         "train.learning_rate=0.5",
                                         "train.beta1=0.5",
                                         "train.weight_decay=0.5",
                                         "train.schedule=constant",
                                         "train.warmup_steps=3",
                                         "train.clip_norm=0.001",
                                         "train.checkpoint_every=1",
                                         "train.log_every=1",
                                         "learners.seq_lora.adapter.rank=1",
                                         "learners.seq_lora.adapter.alpha=1",
                                         "learners.seq_lora.adapter.target_modules=[query]",
                                         "learners.seq_lora.adapter.use_rslora=true",
                                         "learners.seq_lora.adapter.init=gaussian",
                                         "learners.seq_lora.train={steps: 2}",
                                         "evaluation.batch_size=3",
                                         "evaluation.ahead=false",
                                         "metrics=[last_pooled]"};
  const std::vector<std::string> trained = {"model.data_path=" + (folder_ / "others_copy.h5").string(),
                                            "model.train.steps=5",
                                            "model.train.batch_size=4",
                                            "model.train.learning_rate=0.5",
                                            "model.train.optimizer=sgd",
                                            "model.train.log_every=1"};
  const std::vector<std::string> small = {"methods=[joint, finetune, finetune_local, seq_lora, simplecil]",
                                          "orders=[3]", "stream.increment=3"};
  for (const bool random : {false, true}) {
    std::vector<std::string> base = small, changes = keys;
    if (random) base.insert(base.end(), {"model.train=null", "model.data_path=\"\""});
    if (!random) changes.insert(changes.end(), trained.begin(), trained.end());
    const auto units = run(base);
    for (const auto& change : changes) {
      std::vector<std::string> overrides = base;
      overrides.push_back(change);
      auto other = load_recipe(folder_ / "recipe.yaml", overrides);
      other.method->open_inputs();
      for (const auto& [label, unit] : units)
        EXPECT_EQ(execute(*other.method, unit)->id(), results_.at(unit.id())->id())
            << label << " by a worker with " << change << (random ? ", random backbone" : "");
    }
  }
}

TEST_F(ContinualRun, MisshapenResultsAreNotAccepted) {
  const auto units = run({"methods=[finetune, er, ewc, ranpac]", "orders=[-1]", "learners.ranpac.features=5"});
  const auto refused = [&](const std::string& label, const std::string& kind, const core::Json& meta,
                           const models::NamedTensors& tensors) {
    std::vector<at::Tensor> keep;
    try {
      recipe_.method->check_result(units.at(label),
                                   *core::Artefact::create(kind, meta, models::views_of(tensors, keep)));
    } catch (const core::UserError&) {
      return true;
    }
    return false;
  };
  const auto parts = [&](const std::string& label) {
    const auto artefact = results_.at(units.at(label).id());
    models::NamedTensors tensors;
    for (const auto& view : artefact->file().tensors()) tensors.emplace_back(view.name, models::copy_of(view));
    core::Json meta = artefact->meta();
    meta.erase("kind");
    return std::pair{meta, tensors};
  };
  const std::string trained = "train/finetune/order-1/seed1/task1", tested = "test/finetune/order-1/seed1/after1";
  auto [meta, tensors] = parts(trained);
  EXPECT_FALSE(refused(trained, "train_weights", meta, tensors));
  EXPECT_TRUE(refused(trained, "train_lora", meta, tensors));
  auto broken = tensors;
  broken[0].second = broken[0].second / 0;
  EXPECT_TRUE(refused(trained, "train_weights", meta, broken));
  auto without = meta;
  without["classes"] = {0, 1};
  EXPECT_TRUE(refused(trained, "train_weights", without, tensors));
  without.erase("classes");
  EXPECT_TRUE(refused(trained, "train_weights", without, tensors));
  const std::string replayed = "train/er/order-1/seed1/task0", summed = "train/ranpac/class0",
                    measured = "train/ewc/order-1/seed1/importance0";
  const auto without_one = [&](const std::string& label, const std::string& kind, const std::string& name) {
    auto [own, left] = parts(label);
    EXPECT_FALSE(refused(label, kind, own, left)) << label;
    EXPECT_GT(std::erase_if(left, [&](const auto& entry) { return entry.first == name; }), 0u) << name;
    return refused(label, kind, own, left);
  };
  EXPECT_TRUE(without_one(replayed, "train_er", "buffer.rows"));
  EXPECT_TRUE(without_one(measured, "importance", "head.weight"));
  EXPECT_TRUE(without_one(summed, "ranpac_class", "gram"));
  auto [of_class, sums] = parts(summed);
  of_class["classes"] = {1};
  EXPECT_TRUE(refused(summed, "ranpac_class", of_class, sums)) << "of another class";
  meta = parts(tested).first;
  EXPECT_FALSE(refused(tested, "evaluation", meta, {}));
  meta["result"][0]["class_incremental"] = 1000;
  EXPECT_TRUE(refused(tested, "evaluation", meta, {}));
  meta["result"] = core::Json::array();
  EXPECT_TRUE(refused(tested, "evaluation", meta, {}));
}

TEST_F(ContinualRun, RunsAreReproducibleAndMicroBatchesChangeRoundingOnly) {
  const auto weights_of = [&](const std::vector<std::string>& overrides) {
    const auto units = run(overrides);
    return results_.at(units.at("train/finetune/order3/seed1/task2").id());
  };
  const std::string methods = "methods=[finetune]";
  const auto whole = weights_of({methods}), again = weights_of({methods}),
             sliced = weights_of({methods, "train.micro_batch_size=3"});
  EXPECT_EQ(whole->id(), again->id());
  EXPECT_NE(whole->id(), sliced->id());
  double largest = 0;
  for (const auto& view : whole->file().tensors()) {
    if (view.name.ends_with("attention.key.bias"))
      continue;  // its gradient is rounding alone, which AdamW scales to full steps
    const at::Tensor a = models::copy_of(view), b = models::copy_of(*sliced->file().find(view.name));
    largest = std::max(largest, (a - b).abs().max().item<double>());
  }
  // 18 AdamW steps of at most 3e-3 each; float32 rounding of a gradient near zero may turn one of them, not all.
  EXPECT_LT(largest, 6e-3);
}

// Old rows of a head are left alone when only the task's own logits are trained.
TEST_F(ContinualRun, LocalLogitsKeepOldRows) {
  const auto units = run({"methods=[finetune_local]", "orders=[-1]"});
  const auto row = [&](int task, int64_t label) {
    const auto artefact = results_.at(units.at("train/finetune_local/order-1/seed1/task" + std::to_string(task)).id());
    const auto classes = artefact->meta().at("classes").get<std::vector<int64_t>>();
    return models::copy_of(
        *artefact->file().find("head.weight"))[std::find(classes.begin(), classes.end(), label) - classes.begin()];
  };
  EXPECT_TRUE(row(1, 0).equal(row(0, 0)));
  EXPECT_TRUE(row(2, 3).equal(row(1, 3)));
  const auto seen = run({"methods=[finetune]", "orders=[-1]"});
  const auto first = results_.at(seen.at("train/finetune/order-1/seed1/task0").id()),
             second = results_.at(seen.at("train/finetune/order-1/seed1/task1").id());
  EXPECT_FALSE(models::copy_of(*second->file().find("head.weight"))[0].equal(
      models::copy_of(*first->file().find("head.weight"))[0]));
}

TEST_F(ContinualRun, MatricesAreWrittenForOtherTools) {
  const auto units = run({"methods=[joint, simplecil]"});
  recipe_.method->publish(*this, folder_.path());
  const core::Hdf5File file(folder_ / "metrics.h5", core::Hdf5File::Mode::kRead);
  EXPECT_EQ(file.text_attribute("format"), "moraine-continual-metrics");
  const std::string name = "joint/order3/seed1/class_incremental";
  EXPECT_EQ(file.shape(name), (std::vector<int64_t>{4, 3}));
  const auto values = file.read_all<double>(name);
  const core::Json cells = tested(units, "test/joint/order3/seed1/after1");
  for (size_t j = 0; j < 2; ++j)
    EXPECT_EQ(values[2 * 3 + j], 10 * cells[j].at("class_incremental").get<double>());  // % of 10 images
  EXPECT_TRUE(std::isnan(values[0]));
  EXPECT_TRUE(std::isnan(values[2 * 3 + 2]));
}

TEST_F(ContinualRun, InputsThatDoNotFitAreNamed) {
  const std::map<std::string, std::vector<std::string>> cases = {
      {"class 1 stands twice: in task 0 and in task 1",
       {"stream.tasks=[{classes: [0, 1]}, {classes: [1, 2, 3, 4, 5]}]"}},
      {"class 5 is in no task", {"stream.tasks=[{classes: [0, 1]}, {classes: [2, 3, 4]}]"}},
      {"class 9 of task 1 is outside", {"stream.tasks=[{classes: [0, 1]}, {classes: [2, 3, 4, 5, 9]}]"}},
      {"metrics.0: fwt cannot be had from this stream: it needs accuracies on tasks before they are trained (set "
       "evaluation.ahead: true",
       {"metrics=[fwt]", "evaluation.ahead=false"}},
      {"these methods know nothing of classes to come", {"metrics=[transfer]", "methods=[simplecil]"}},
      {"intransigence cannot be had from this stream: it needs the method joint",
       {"metrics=[intransigence]", "methods=[finetune]"}},
      {"it compares tasks, and the stream has one", {"metrics=[bwt]", "stream.increment=6"}},
      {"would know the labels of tasks to come", {"model.data_path=" + (folder_ / "images.h5").string()}},
      {"rank", {"learners.seq_lora.adapter.rank=9"}},
  };
  for (const auto& [part, overrides] : cases) {
    EXPECT_NE(refusal(overrides).find(part), std::string::npos) << part << ":\n" << refusal(overrides);
  }
  EXPECT_EQ(refusal({"model.architecture.num_channels=3"}), "accepted") << "grey images are repeated";
  EXPECT_EQ(refusal({"metrics=[fwt, intransigence]"}), "accepted");
}

}  // namespace
}  // namespace moraine::algorithms
