#include <algorithm>
#include <map>
#include <set>

#include <gtest/gtest.h>

#include "algorithms/register.h"
#include "core/error.h"

namespace moraine::algorithms {
namespace {

// A method on recorded inputs (no files), and results that are made up as the plan asks for them.
class FlexMorePlan : public testing::Test, public RunState {
 protected:
  std::unique_ptr<Method> method(const std::vector<std::string>& overrides) {
    const auto recipe = load_recipe(std::string(MORAINE_SOURCE_DIR) + "/recipes/flexmore/olmo2-7b.yaml", overrides);
    core::Json fingerprints = {{"public", "p"}};
    for (const auto& d : recipe.values.at("domains"))
      fingerprints[d.at("name").get<std::string>()] = "data of " + d.at("name").get<std::string>();
    const core::Json architecture = recipe.method->inputs().at("architecture");
    return find_method("flexmore")
        .restore(recipe.values, {{"architecture", architecture}, {"fingerprints", fingerprints}, {"model", "dir:1"}});
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

  // Finishes a unit; evaluations score `bits` per byte.
  void finish(const Unit& unit, double bits = 2) {
    const core::Json result = {
        {"nats", bits * 1000 * 0.6931471805599453}, {"tokens", 1000}, {"bytes", 1000}, {"correct", 10}};
    const core::Json load = {{"experts", core::Json::array({"public"})}, {"selected", {{1.0}}}};
    results_[unit.id()] = core::Artefact::create(unit.kind,
                                                 {{"of", unit.id()},
                                                  {"result", result},
                                                  {"rank", 0},
                                                  {"parameters", 1},
                                                  {"added_parameters", 1},
                                                  {"curve", core::Json::array()},
                                                  {"load", load}},
                                                 {});
  }

  std::map<std::string, core::ArtefactPtr> results_;
};

std::multiset<std::string> kinds(const std::vector<Unit>& units) {
  std::multiset<std::string> out;
  for (const auto& unit : units) out.insert(unit.kind);
  return out;
}

TEST_F(FlexMorePlan, IsAFanOutAndMergesAndEnds) {
  const auto flexmore = method({});
  std::vector<std::multiset<std::string>> waves;
  for (Plan plan = flexmore->plan(*this); !plan.pending.empty(); plan = flexmore->plan(*this)) {
    waves.push_back(kinds(plan.pending));
    for (const auto& unit : plan.pending) finish(unit);
    ASSERT_LT(waves.size(), 20u);
  }
  ASSERT_GE(waves.size(), 4u);
  EXPECT_EQ(waves[0].count("embed_public"), 1u);
  EXPECT_EQ(waves[1].count("train_expert"), 6u);
  EXPECT_EQ(waves[2].count("merge") + waves[2].count("soup"),
            2u);  // all experts are full-size: one merge serves both mixtures
  EXPECT_EQ(waves.back().count("evaluate"), waves.back().size());
}

TEST_F(FlexMorePlan, IsAPureFunctionOfTheResults) {
  const auto flexmore = method({"domains.0.rank=auto"});
  for (int wave = 0; wave < 3; ++wave) {
    const Plan once = flexmore->plan(*this), twice = flexmore->plan(*this);
    ASSERT_EQ(once.pending.size(), twice.pending.size());
    for (size_t i = 0; i < once.pending.size(); ++i) EXPECT_EQ(once.pending[i].id(), twice.pending[i].id());
    for (const auto& unit : once.pending) finish(unit);
  }
}

TEST_F(FlexMorePlan, AChangedKeyRedoesOnlyWhatItDetermines) {
  const auto before = method({});
  for (Plan plan = before->plan(*this); !plan.pending.empty(); plan = before->plan(*this))
    for (const auto& unit : plan.pending) finish(unit);
  EXPECT_EQ(kinds(method({"top_k=3"})->plan(*this).pending).count("train_expert"), 0u);
  EXPECT_GT(kinds(method({"top_k=3"})->plan(*this).pending).count("evaluate"), 0u);
  EXPECT_EQ(kinds(method({"train.steps=7"})->plan(*this).pending).count("train_expert"), 6u);
  // Who computes low-rank experts changes bits, of evaluations and of experts that are trained as low rank, nothing
  // else's.
  EXPECT_EQ(kinds(method({"kernels=reference"})->plan(*this).pending).count("train_expert"), 0u);
  EXPECT_GT(kinds(method({"kernels=reference"})->plan(*this).pending).count("evaluate"), 0u);
  EXPECT_TRUE(
      method({"train.checkpoint_every=7", "train.log_every=3", "workers.local=3"})->plan(*this).pending.empty());
  EXPECT_EQ(kinds(method({"norm_topk_prob=true"})->plan(*this).pending).count("train_expert"), 6u)
      << "gates are part of the forward pass that trains";
  EXPECT_EQ(kinds(method({"forward=per_expert"})->plan(*this).pending).count("train_expert"), 0u);
  EXPECT_EQ(kinds(method({"ranks.budget=0.9"})->plan(*this).pending).size(), 0u) << "no rank is chosen";
  EXPECT_FALSE(method({"workers.threads=2"})->plan(*this).pending.empty());
  EXPECT_EQ(kinds(method({"workers.group_size=2"})->plan(*this).pending).count("embed_public"), 1u)
      << "which everything waits for";
  EXPECT_TRUE(method({"workers.bucket_mib=1", "workers.overlap=false"})->plan(*this).pending.empty());
}

// A key that another one makes irrelevant costs nothing.
TEST_F(FlexMorePlan, AKeyThatIsNotUsedChangesNoUnit) {
  const auto finish_all = [&](const std::vector<std::string>& overrides) {
    const auto flexmore = method(overrides);
    for (Plan plan = flexmore->plan(*this); !plan.pending.empty(); plan = flexmore->plan(*this))
      for (const auto& unit : plan.pending) finish(unit);
  };
  finish_all({"router.init=regression"});
  EXPECT_TRUE(method({"router.init=regression", "router.init_norm=3", "router.bias_value=-2", "kernels=auto"})
                  ->plan(*this)
                  .pending.empty());
  EXPECT_FALSE(method({"router.init=regression", "router.init_logit=3"})->plan(*this).pending.empty());
  finish_all({"router.init=centered"});
  EXPECT_TRUE(method({"router.init=centered", "router.init_logit=3"})->plan(*this).pending.empty());
  EXPECT_FALSE(method({"router.init=centered", "router.init_norm=3"})->plan(*this).pending.empty());
}

TEST_F(FlexMorePlan, AFinishedRunMissesNoResult) {
  const auto flexmore = method({"leave_out=[code]"});
  Plan plan;
  for (plan = flexmore->plan(*this); !plan.pending.empty(); plan = flexmore->plan(*this)) {
    EXPECT_EQ(flexmore->missing_result(*this), std::nullopt) << "work is left";
    for (const auto& unit : plan.pending) finish(unit);
  }
  EXPECT_EQ(flexmore->missing_result(*this), std::nullopt);
  EXPECT_NE(flexmore->summary(*this).at("hash"), "");
  for (const auto& unit : plan.finished) {
    EXPECT_NE(unit.label, "train/code");
    EXPECT_NE(unit.label, "test/expert/code");
  }
}

std::set<std::string> ids_of(const std::vector<Unit>& units) {
  std::set<std::string> ids;
  for (const auto& unit : units) ids.insert(unit.id());
  return ids;
}

TEST_F(FlexMorePlan, ComparisonsAddUnitsAndChangeNone) {
  const std::vector<std::string> small = {"domains=[{name: a}, {name: b}]", "ranks.candidates=[1024, 512]"};
  std::vector<std::string> with = small;
  with.push_back("comparisons=[btm, cross_domain, joint, random_subspace, rank_sweep, scaled_delta]");
  const auto finish_all = [&](const std::vector<std::string>& overrides) {
    const auto flexmore = method(overrides);
    Plan plan = flexmore->plan(*this);
    for (int wave = 0; wave < 20 && !plan.pending.empty(); ++wave, plan = flexmore->plan(*this))
      for (const auto& unit : plan.pending) finish(unit);
    EXPECT_TRUE(plan.pending.empty());
    return plan.finished;
  };
  const auto before = finish_all(small), after = finish_all(with);
  const std::set<std::string> old_ids = ids_of(before), new_ids = ids_of(after);
  EXPECT_TRUE(std::includes(new_ids.begin(), new_ids.end(), old_ids.begin(), old_ids.end()));
  std::map<std::string, int> added;
  for (const auto& unit : after)
    if (!old_ids.count(unit.id())) ++added[unit.label.substr(0, unit.label.find('/', 5))];
  // Two experts on three texts, own ones known already; a sweep of two ranks, of which each expert's chosen one is
  // known.
  EXPECT_EQ(added, (std::map<std::string, int>{{"test/btm", 3},
                                               {"test/cross", 4},
                                               {"train", 1},
                                               {"test/joint", 3},
                                               {"extract", 2},
                                               {"test/random_subspace", 4},
                                               {"test/rank", 2},
                                               {"test/scaled", 6}}));
  for (const auto& unit : after) {
    if (unit.label == "train/joint") {
      EXPECT_EQ(unit.spec.at("train").at("steps"), 2 * 100) << "two experts' default number of steps";
    }
  }
  const core::Json summary = method(with)->summary(*this);
  std::set<std::string> titles;
  for (const auto& table : summary.at("tables")) titles.insert(table.at("title").get<std::string>());
  EXPECT_TRUE(titles.count("Rank sweep: regression of the score on log2(rank)"));
  EXPECT_TRUE(titles.count("Own expert at a rank: random subspace against PHLoRA, bits per byte"));
}

TEST_F(FlexMorePlan, KernelsAreTrainedIntoDirectExperts) {
  const std::string direct = "domains=[{name: a, train: direct, rank: \"4\"}]";
  const auto trained = [&](const std::string& kernels) {
    std::set<std::string> ids;
    const auto flexmore = method({direct, "kernels=" + kernels});
    for (int wave = 0; wave < 2; ++wave)
      for (const auto& unit : flexmore->plan(*this).pending) {
        if (unit.kind == "train_expert") ids.insert(unit.id());
        finish(unit);
      }
    return ids;
  };
  const auto by_auto = trained("auto"), by_reference = trained("reference");
  ASSERT_EQ(by_auto.size(), 1u);
  ASSERT_EQ(by_reference.size(), 1u);
  EXPECT_NE(by_auto, by_reference);
}

// Two experts, candidates 1 and 2, room for three units of rank: the second unit goes to the expert that gains more.
TEST_F(FlexMorePlan, RanksAreTheBestChoiceWithinTheBudget) {
  const auto flexmore = method({"domains=[{name: a}, {name: b}]", "ranks.candidates=[1024, 512]", "ranks.budget=0.26"});
  // budget 0.26 * 2 F / unit = 1552 units of rank: one expert at 1024 and one at 512.
  const std::map<std::string, double> bits = {
      {"validate/a/r512", 3.0}, {"validate/a/r1024", 2.9}, {"validate/b/r512", 4.0}, {"validate/b/r1024", 3.5}};
  Plan plan;
  for (plan = flexmore->plan(*this); !plan.pending.empty(); plan = flexmore->plan(*this))
    for (const auto& unit : plan.pending) finish(unit, bits.count(unit.label) ? bits.at(unit.label) : 2);
  std::map<std::string, int64_t> chosen;
  for (const auto& unit : plan.finished) {
    if (unit.label.starts_with("test/low_rank_expert/"))
      chosen[unit.label.substr(21)] = unit.spec.at("rank").get<int64_t>();
  }
  EXPECT_EQ(chosen, (std::map<std::string, int64_t>{{"a", 512}, {"b", 1024}}));
}

TEST_F(FlexMorePlan, ABudgetThatFitsNothingSaysSo) {
  const auto flexmore = method({"domains=[{name: a}, {name: b}]", "ranks.candidates=[2048]", "ranks.budget=0.1"});
  EXPECT_THROW(
      {
        for (Plan plan = flexmore->plan(*this); !plan.pending.empty(); plan = flexmore->plan(*this))
          for (const auto& unit : plan.pending) finish(unit);
      },
      core::UserError);
}

}  // namespace
}  // namespace moraine::algorithms
