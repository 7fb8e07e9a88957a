// Units of a continual run, executed in this thread on a set of tiny images, against plain loops.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <map>

#include <gtest/gtest.h>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>

#include "algorithms/register.h"
#include "core/error.h"
#include "core/hdf5.h"
#include "data/fingerprint.h"
#include "data/task_stream.h"
#include "models/tensor_io.h"
#include "models/vit.h"
#include "tests/temporary_directory.h"
#include "worker/context.h"

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
lora: {rank: 2}
)";

class ContinualRun : public testing::Test, public RunState {
 protected:
  ContinualRun() {
    write_images("images.h5", 6, 97);
    write_images("others.h5", 3, 98);
    folder_.write("recipe.yaml", kRecipe);
  }

  // Noisy images whose brightest pixel tells the class; 14 training and 5 test images each.
  void write_images(const std::string& name, int64_t classes, uint32_t state) {
    core::Hdf5File file(folder_ / name, core::Hdf5File::Mode::kCreate);
    file.set_attribute("format", "moraine-images");
    file.set_attribute("format_version", 1);
    file.set_attribute("name", "tiny");
    core::Json names = core::Json::array();
    for (int64_t label = 0; label < classes; ++label) names.push_back("c" + std::to_string(label));
    file.set_attribute("class_names", names.dump());
    for (const auto& [split, each] : {std::pair{"train", 14}, std::pair{"test", 5}}) {
      std::vector<uint8_t> pixels;
      std::vector<int64_t> labels;
      for (int64_t row = 0; row < each * classes; ++row) {
        labels.push_back(row % classes);
        for (int64_t pixel = 0; pixel < 16; ++pixel) {
          state = state * 1664525 + 1013904223;
          pixels.push_back(static_cast<uint8_t>((state >> 24) / 2 + (pixel == 2 * labels.back() ? 120 : 0)));
        }
      }
      file.write<uint8_t>(std::string(split) + "/images", pixels, {each * classes, 1, 4, 4});
      file.write<int64_t>(std::string(split) + "/labels", labels, {each * classes});
    }
    file.set_attribute("fingerprint", data::image_fingerprint(file));
    file.close();
  }

  std::optional<std::string> result(const std::string& unit) const override {
    const auto it = results_.find(unit);
    return it == results_.end() ? std::nullopt : std::optional(it->second->id());
  }
  core::ArtefactPtr artefact(const std::string& id) const override { return artefacts_.at(id); }

  // Runs everything and returns the finished units by label.
  std::map<std::string, Unit> run(const std::vector<std::string>& overrides = {}) {
    results_.clear();
    recipe_ = load_recipe(folder_ / "recipe.yaml", overrides);
    recipe_.method->open_inputs();
    static const std::atomic<int> no_signals{0};
    worker::WorkerOptions options;
    for (Plan plan = recipe_.method->plan(*this); !plan.pending.empty(); plan = recipe_.method->plan(*this))
      for (const auto& unit : plan.pending) {
        worker::DirectContext context(unit, 1, options, no_signals,
                                      {.artefact = [&](const std::string& id) { return artefacts_.at(id); },
                                       .metric = [](const core::metrics::Record&) {},
                                       .progress = [](double, double) {}});
        results_[unit.id()] = recipe_.method->execute(unit, context);
        artefacts_[results_[unit.id()]->id()] = results_[unit.id()];
      }
    std::map<std::string, Unit> units;
    for (const auto& unit : recipe_.method->plan(*this).finished) units[unit.label] = unit;
    return units;
  }
  core::Json tested(const std::map<std::string, Unit>& units, const std::string& label) const {
    return results_.at(units.at(label).id())->meta().at("result");
  }
  std::string refusal(const std::vector<std::string>& overrides) {
    try {
      load_recipe(folder_ / "recipe.yaml", overrides).method->open_inputs();
    } catch (const core::UserError& error) {
      return error.what();
    }
    return "accepted";
  }

  TemporaryDirectory folder_;
  ParsedRecipe recipe_;
  std::map<std::string, core::ArtefactPtr> results_, artefacts_;
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

TEST_F(ContinualRun, ClassMeansDoNotDependOnTheOrder) {
  const auto units = run({"methods=[simplecil]"});
  int64_t correct[2] = {0, 0};
  for (const auto& [index, order] : {std::pair{0, "order-1"}, std::pair{1, "order3"}})
    for (const auto& cell : tested(units, std::string("test/simplecil/") + order + "/seed1/after2"))
      correct[index] += cell.at("class_incremental").get<int64_t>();
  EXPECT_EQ(correct[0], correct[1]);
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
      {"simplecil has no prototype of a class to come", {"metrics=[transfer]", "methods=[simplecil]"}},
      {"intransigence cannot be had from this stream: it needs the method joint",
       {"metrics=[intransigence]", "methods=[finetune]"}},
      {"it compares tasks, and the stream has one", {"metrics=[bwt]", "stream.increment=6"}},
      {"would know the labels of tasks to come", {"model.data_path=" + (folder_ / "images.h5").string()}},
      {"rank", {"lora.rank=9"}},
  };
  for (const auto& [part, overrides] : cases) {
    EXPECT_NE(refusal(overrides).find(part), std::string::npos) << part << ":\n" << refusal(overrides);
  }
  EXPECT_EQ(refusal({"model.architecture.num_channels=3"}), "accepted") << "grey images are repeated";
  EXPECT_EQ(refusal({"metrics=[fwt, intransigence]"}), "accepted");
}

}  // namespace
}  // namespace moraine::algorithms
