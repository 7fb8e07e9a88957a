#include <algorithm>
#include <map>
#include <set>

#include <gtest/gtest.h>

#include "algorithms/adapters/config.h"
#include "algorithms/register.h"
#include "core/error.h"

namespace moraine::algorithms {
namespace {

// The Fashion-MNIST recipe on recorded inputs (no files): 3 tasks of 2 classes in two orders. Results are made up as
// the plan asks.
class ContinualPlan : public testing::Test, public RunState {
 protected:
  std::unique_ptr<Method> method(const std::vector<std::string>& overrides) {
    std::vector<std::string> all = {"orders=[-1, 7]", "seeds=[1, 2]"};
    all.insert(all.end(), overrides.begin(), overrides.end());
    const auto recipe = load_recipe(std::string(MORAINE_SOURCE_DIR) + "/recipes/continual/fashion_mnist.yaml", all);
    core::Json streams = core::Json::array();
    for (const auto order : recipe.values.at("orders").get<std::vector<int64_t>>()) {
      core::Json tasks = core::Json::array();
      for (int64_t task = 0; task < 3; ++task)
        tasks.push_back({{"classes", {2 * task, 2 * task + 1}}, {"train", 40}, {"test", 20}});
      streams.push_back({{"order", order}, {"hash", "stream " + std::to_string(order)}, {"tasks", tasks}});
    }
    core::Json inputs = recipe.method->inputs();
    inputs["streams"] = streams;
    inputs["fingerprint"] = "images";
    inputs["backbone_fingerprint"] = "others";
    return find_method("continual").restore(recipe.values, inputs);
  }

  std::optional<std::string> result(const std::string& unit) const override {
    const auto it = results_.find(unit);
    return it == results_.end() ? std::nullopt : std::optional(it->second->id());
  }
  core::ArtefactPtr artefact(const std::string& id) const override {
    for (const auto& [unit, artefact] : results_)
      if (artefact->id() == id) return artefact;
    throw core::InternalError("never accepted");
  }
  // Every accuracy is 50 %, where there is one.
  void finish(const Unit& unit) {
    core::Json result = core::Json::array();
    if (unit.kind == "evaluate") {
      const auto after = unit.spec.at("after").get<int64_t>();
      const bool head = unit.spec.at("state") != "prototype";
      for (int64_t j = 0; j < 3; ++j)
        result.push_back({{"images", 20},
                          {"class_incremental", j <= after ? core::Json(10) : core::Json(nullptr)},
                          {"task_incremental", head || j <= after ? core::Json(10) : core::Json(nullptr)}});
    }
    results_[unit.id()] =
        core::Artefact::create(unit.kind, {{"of", unit.id()}, {"result", result}, {"curve", {{1, 0.5}}}}, {});
  }
  std::vector<Unit> finish_all(const Method& of) {
    std::vector<Unit> units;
    for (Plan plan = of.plan(*this); !plan.pending.empty(); plan = of.plan(*this)) {
      for (const auto& unit : plan.pending) finish(unit);
      units.insert(units.end(), plan.pending.begin(), plan.pending.end());
      if (units.size() > 2000) throw core::InternalError("the plan does not end");
    }
    return units;
  }
  static std::set<std::string> labels(const std::vector<Unit>& units, const std::string& prefix) {
    std::set<std::string> out;
    for (const auto& unit : units)
      if (unit.label.starts_with(prefix)) out.insert(unit.label);
    return out;
  }

  std::map<std::string, core::ArtefactPtr> results_;
};

TEST_F(ContinualPlan, EvaluationsOfATaskWaitBesideTheNextTask) {
  const auto continual = method({"methods=[seq_lora]", "orders=[7]", "seeds=[1]"});
  ASSERT_EQ(continual->plan(*this).pending.size(), 1u);
  EXPECT_EQ(continual->plan(*this).pending[0].kind, "train_backbone");
  finish(continual->plan(*this).pending[0]);
  EXPECT_EQ(labels(continual->plan(*this).pending, ""),
            (std::set<std::string>{"test/seq_lora/order7/seed1/before", "train/seq_lora/order7/seed1/task0"}));
  // Training alone goes on: no evaluation is waited for.
  for (int64_t task = 0; task < 3; ++task) {
    const Plan plan = continual->plan(*this);
    const auto train = std::find_if(plan.pending.begin(), plan.pending.end(),
                                    [](const Unit& unit) { return unit.kind == "train_lora"; });
    ASSERT_NE(train, plan.pending.end()) << task;
    EXPECT_EQ(train->label, "train/seq_lora/order7/seed1/task" + std::to_string(task));
    EXPECT_TRUE(std::all_of(plan.pending.begin(), plan.pending.end(), [&](const Unit& unit) {
      return unit.kind != "evaluate" || unit.cost < train->cost;
    })) << "the chain is the longest path: it must come first";
    finish(*train);
  }
  EXPECT_EQ(labels(continual->plan(*this).pending, "").size(), 4u);  // before, after 0, 1, 2
  EXPECT_EQ(labels(finish_all(*continual), "matrices").size(), 1u);
}

TEST_F(ContinualPlan, NoStateIsEvaluatedBeforeAllItsPartsAreThere) {
  const auto continual = method({"methods=[simplecil]", "orders=[-1]", "seeds=[1]"});
  finish(continual->plan(*this).pending.at(0));  // the backbone
  std::vector<Unit> prototypes = continual->plan(*this).pending;
  ASSERT_EQ(prototypes.size(), 6u);
  std::reverse(prototypes.begin(), prototypes.end());  // class means of the last tasks come first
  for (const auto& prototype : prototypes) {
    for (const auto& unit : continual->plan(*this).pending)
      if (unit.kind == "evaluate") ADD_FAILURE() << unit.label << " before " << prototype.label << " is there";
    finish(prototype);
  }
  std::set<int> parts;
  for (const auto& unit : continual->plan(*this).pending) parts.insert(unit.spec.at("parts").get<int>());
  EXPECT_EQ(parts, (std::set<int>{2, 4, 6}));
}

TEST_F(ContinualPlan, EqualWorkIsDoneOnce) {
  const auto continual = method({});
  std::map<std::string, int> kinds;
  const std::vector<Unit> units = finish_all(*continual);
  for (const auto& unit : units) ++kinds[unit.kind];
  const int runs = 4, tasks = 3, classes = 6, orders = 2;
  EXPECT_EQ(kinds["prototype"], classes) << "class means belong to no order and no seed";
  // joint, finetune, finetune_local: 3 x 3 units per run, whose first one is shared by all three.
  EXPECT_EQ(kinds["train_weights"], runs * (3 * tasks - 2));
  EXPECT_EQ(kinds["train_lora"], runs * (2 * tasks - 1));
  // One evaluation before training per run; after a shared first task, one for all that share it; class means: one per
  // order.
  EXPECT_EQ(kinds["evaluate"], runs * (1 + (3 * tasks - 2) + (2 * tasks - 1)) + orders * tasks);
  EXPECT_EQ(kinds["train_backbone"], 1);
}

TEST_F(ContinualPlan, IsAPureFunctionOfTheResults) {
  const auto continual = method({});
  for (int wave = 0; wave < 4; ++wave) {
    const Plan once = continual->plan(*this), twice = continual->plan(*this);
    ASSERT_EQ(once.pending.size(), twice.pending.size());
    for (size_t i = 0; i < once.pending.size(); ++i) EXPECT_EQ(once.pending[i].id(), twice.pending[i].id());
    for (const auto& unit : once.pending) finish(unit);
  }
}

TEST_F(ContinualPlan, AChangedKeyRedoesOnlyWhatItDetermines) {
  finish_all(*method({}));
  const auto pending = [&](const std::string& change) {
    std::set<std::string> kinds;
    for (const auto& unit : method({change})->plan(*this).pending) kinds.insert(unit.kind);
    return kinds;
  };
  using Kinds = std::set<std::string>;
  EXPECT_EQ(pending("workers.local=3"), Kinds{});
  EXPECT_EQ(pending("train.checkpoint_every=7"), Kinds{});
  EXPECT_EQ(pending("metrics=[bwt]"), Kinds{});
  EXPECT_EQ(pending("methods=[joint, simplecil]"), Kinds{"matrices"});
  EXPECT_EQ(pending("learners.seq_lora.adapter.rank=4"), Kinds{"train_lora"});
  EXPECT_EQ(pending("train.steps=61"), Kinds{"train_weights"});
  EXPECT_EQ(pending("evaluation.batch_size=7"), Kinds{"evaluate"});
  EXPECT_EQ(pending("seeds=[1, 2, 3]"), (Kinds{"train_weights", "train_lora", "evaluate"}));
  EXPECT_EQ(pending("seed=2"), Kinds{"train_backbone"});
}

// As recipe.json and inputs.json stood in run directories before learners had options of their own and backbones were
// of other families.
TEST_F(ContinualPlan, RunsRecordedWithOlderKeysKeepTheirUnits) {
  const auto recipe = load_recipe(std::string(MORAINE_SOURCE_DIR) + "/recipes/continual/fashion_mnist.yaml", {});
  core::Json inputs = recipe.method->inputs(), older = recipe.values;
  const core::Json options = older.at("learners").at("seq_lora");
  older["lora"] = options.at("adapter");
  older["lora_train"] = options.at("train");
  older.erase("learners");
  inputs["streams"] = {
      {{"order", -1}, {"hash", "stream"}, {"tasks", {{{"classes", {0, 1}}, {"train", 40}, {"test", 20}}}}}};
  core::Json older_inputs = inputs;
  older_inputs["architecture"] = inputs.at("model").at("config");
  older_inputs.erase("model");
  older_inputs.erase("tokens");
  const MethodEntry& entry = find_method("continual");
  EXPECT_EQ(entry.identity(older), entry.identity(recipe.values));
  finish_all(*entry.restore(recipe.values, inputs));
  const auto restored = entry.restore(older, older_inputs);
  EXPECT_TRUE(restored->plan(*this).pending.empty()) << restored->plan(*this).pending.front().spec;
  EXPECT_EQ(restored->inputs().at("model").at("slots"), inputs.at("model").at("slots"));
}

// Older runs always recorded the whole block, today's recipes leave out what is the default.
TEST_F(ContinualPlan, RunsRecordedWithTheDefaultsOfOlderKeysAreTheSameRecipe) {
  const auto recipe = load_recipe(std::string(MORAINE_SOURCE_DIR) + "/recipes/continual/fashion_mnist.yaml",
                                  {"learners.seq_lora=null", "methods=[finetune]"});
  core::Json older = recipe.values;
  older["lora"] = adapters::adapter_schema().to_json({});
  EXPECT_EQ(find_method("continual").identity(older), find_method("continual").identity(recipe.values));
}

TEST_F(ContinualPlan, AnUnfinishedRunHasASummary) {
  const auto continual = method({"methods=[finetune, simplecil]"});
  for (int wave = 0; wave < 20; ++wave) {
    const core::Json summary = continual->summary(*this);
    EXPECT_EQ(summary.at("tables").is_array(), true);
    const Plan plan = continual->plan(*this);
    if (plan.pending.empty()) break;
    finish(plan.pending.front());
  }
  finish_all(*continual);
  const core::Json summary = continual->summary(*this);
  const core::Json& rows = summary.at("tables")[0].at("rows");
  ASSERT_EQ(rows.size(), 2u);
  for (const auto& row : rows) EXPECT_EQ(row.at("last"), 50.0) << row;
  EXPECT_EQ(summary.at("hash").get<std::string>().size(), 64u);
}

TEST(ContinualConfig, WrongRecipesAreRefused) {
  const auto refusal = [](const std::string& change) -> std::string {
    try {
      load_recipe(std::string(MORAINE_SOURCE_DIR) + "/recipes/continual/fashion_mnist.yaml", {change});
    } catch (const core::UserError& error) {
      return error.what();
    }
    return "accepted";
  };
  const std::map<std::string, std::string> cases = {
      {"methods=[simplcil]", "did you mean 'simplecil'"},
      {"metrics=[forgetting]", "not one of the choices"},
      {"methods=[joint, joint]", "methods: \"joint\" stands twice"},
      {"orders=[3, 3]", "orders: 3 stands twice"},
      {"seeds=[2, 2]", "seeds: 2 stands twice"},
      {"metrics=[bwt, bwt]", "stands twice"},
      {"stream.leave_out=[1, 1]", "leave_out: 1 stands twice"},
      {"orders=[]", "orders must not be empty"},
      {"model.data_path=\"\"", "train and data_path belong together"},
      {"train.dtype=bfloat16", "float32"},
      {"model.architecture.patch_size=5", "multiple of patch_size"},
      {"stream.increment=0", "increment"},
      {"stream.tasks=[{classes: [0]}, {path: one.h5}]", "give either all tasks a path or none"},
      {"stream.tasks=[{}]", "give one of classes and path"},
      {"lora.rank=4", "lora: has moved to learners.seq_lora.adapter"},
      {"lora_train={steps: 3}", "lora_train: has moved to learners.seq_lora.train"},
      {"learners.seq_lora.adaptor.rank=4", "did you mean 'adapter'"},
      {"learners.seq_laro.adapter.rank=4", "did you mean 'seq_lora'"},
      {"images=null", "give exactly one of images, texts and tasks with paths"},
      {"texts.path=texts.h5", "give exactly one of images, texts and tasks with paths"},
  };
  for (const auto& [change, part] : cases)
    EXPECT_NE(refusal(change).find(part), std::string::npos) << change << ": " << refusal(change);
  EXPECT_EQ(refusal("seeds=[4]"), "accepted");
}

}  // namespace
}  // namespace moraine::algorithms
