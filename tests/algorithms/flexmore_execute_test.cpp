// Units of a FlexMoRE run, executed in this thread on tiny models and texts.
#include <algorithm>
#include <map>
#include <set>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "algorithms/flexmore/encoder.h"
#include "algorithms/flexmore/mixture_files.h"
#include "algorithms/language_model.h"
#include "algorithms/register.h"
#include "core/error.h"
#include "core/file.h"
#include "data/byte_tokenizer.h"
#include "models/bert.h"
#include "tests/algorithms/tiny_run.h"
#include "tests/models/random_tensors.h"
#include "tests/temporary_directory.h"

namespace moraine::algorithms {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::Not;

constexpr const char* kRecipe = R"(
name: tiny
method: flexmore
model: {path: model}
public_path: public.h5
public_encoder_text: public_encoded.h5
domains:
  - {name: right, path: right.h5, encoder_text: right_encoded.h5}
  - {name: left, path: left.h5, encoder_text: left_encoded.h5, rank: 2}
  - {name: code, path: code.h5, encoder_text: code_encoded.h5, rank: 3, train: direct}
seq_len: 8
train: {steps: 3, batch_size: 4, micro_batch_size: 2, learning_rate: 1e-2, warmup_steps: 1}
router: {embedding_sequences: 3}
ranks: {candidates: [1, 2], budget: 0.9}
top_k: 3
comparisons: [btm, cross_domain, joint]
evaluation: {sequences: 2, validation_sequences: 2, batch_size: 2}
)";

using Overrides = std::vector<std::string>;

class FlexMoreRun : public testing::Test {
 protected:
  FlexMoreRun() {
    models::DecoderConfig config = models::tiny_config(models::DecoderConfig::Family::kOlmo2);
    config.vocab_size = 264;
    config.initializer_range = 0.3;
    const auto model = models::Decoder::from_config(config, 5, at::kFloat);
    std::filesystem::create_directory(folder_ / "model");
    write_model_directory(folder_ / "model", config.to_json(), {model.weights().begin(), model.weights().end()});
    write_encoder();
    for (const char* name : {"public", "right", "left", "code"}) {
      write_text_file(folder_ / (std::string(name) + ".h5"), name, data::ByteTokenizer::kName, 40);
      write_text_file(folder_ / (std::string(name) + "_encoded.h5"), name,
                      flexmore::DomainEncoder::tokenizer(folder_ / "encoder"), 700);
    }
    folder_.write("recipe.yaml", kRecipe);
  }

  void write_encoder() {
    models::BertConfig config;
    config.vocab_size = 300, config.hidden_size = 6, config.intermediate_size = 8, config.num_layers = 1,
    config.num_heads = 2, config.max_position_embeddings = 128;
    const models::Bert bert = models::Bert::from_config(config, 1, at::kFloat);
    std::filesystem::create_directory(folder_ / "encoder");
    write_model_directory(folder_ / "encoder", config.to_json(), {bert.weights().begin(), bert.weights().end()});
    folder_.write("encoder/tokenizer.json",
                  R"({"added_tokens": [{"id": 3, "content": "[CLS]"}, {"id": 4, "content": "[SEP]"}]})");
  }

  std::filesystem::path recipe() const { return folder_ / "recipe.yaml"; }

  // A worker of `run` whose own recipe has other values: it has the run's files and nothing else of it.
  std::unique_ptr<Method> worker_with(const TinyRun& run, Overrides overrides) const {
    const ParsedRecipe own = load_recipe(recipe(), overrides);
    core::Json inputs = run.method().inputs();
    inputs["architecture"] = own.method->inputs().at("architecture");
    return find_method("flexmore").restore(own.values, inputs);
  }

  void expect_same_artefacts(const TinyRun& run, const Overrides& overrides, const std::string& what) const {
    const auto worker = worker_with(run, overrides);
    for (const auto& unit : run.finished()) {
      const auto made = TinyRun::execute(*worker, unit, run);
      EXPECT_EQ(made->id(), run.result(unit.id())) << unit.label << " by a worker whose recipe has " << what;
    }
  }

  TemporaryDirectory folder_;
};

// Values that differ from the ones of kRecipe and of every run below.
const Overrides kOtherValues = {"seed=77",
                                "seq_len=5",
                                "train.steps=2",
                                "train.batch_size=3",
                                "train.micro_batch_size=1",
                                "train.optimizer=sgd",
                                "train.learning_rate=0.5",
                                "train.beta1=0.1",
                                "train.beta2=0.3",
                                "train.epsilon=0.1",
                                "train.momentum=0.7",
                                "train.weight_decay=0.4",
                                "train.schedule=constant",
                                "train.final_lr_ratio=0.7",
                                "train.warmup_steps=0",
                                "train.clip_norm=0.01",
                                "train.checkpoint_every=2",
                                "train.log_every=1",
                                "router.init_logit=3",
                                "router.init_norm=2",
                                "router.bias=constant",
                                "router.bias_value=-1",
                                "router.embedding_sequences=1",
                                "ranks.candidates=[3]",
                                "ranks.budget=0.8",
                                "top_k=1",
                                "norm_topk_prob=true",
                                "forward=per_expert",
                                "kernels=reference",
                                "leave_out=[right]",
                                "comparisons=[]",
                                "evaluation.sequences=1",
                                "evaluation.validation_sequences=1",
                                "evaluation.batch_size=1",
                                "evaluation.split=validation",
                                "model.save_dtype=bfloat16",
                                "workers.threads=2"};

TEST_F(FlexMoreRun, AWorkerExecutesTheUnitWhateverItsOwnRecipeSays) {
  TinyRun run(recipe(), {});
  run.run();
  std::set<std::string> kinds;
  for (const auto& unit : run.finished()) kinds.insert(unit.kind);
  EXPECT_THAT(kinds, ElementsAre("embed_public", "evaluate", "extract", "merge", "train_expert"));
  Overrides each = kOtherValues;
  each.insert(each.end(), {"train.dtype=bfloat16", "router.init=centered", "router.train=true", "domains.0.rank=full",
                           "domains.2.rank=1"});
  for (const auto& override : each) expect_same_artefacts(run, {override}, override);
}

TEST_F(FlexMoreRun, AWorkerExecutesTheUnitWithEveryKindOfModelRouterAndComparison) {
  const std::string shapes =
      "model.architecture={vocab_size: 264, hidden_size: 8, intermediate_size: 12, num_layers: 2, num_heads: 2}";
  const std::string every = "comparisons=[btm, cross_domain, joint, random_subspace, rank_sweep, scaled_delta]";
  const std::string full = "domains.2.train=full";
  const std::vector<Overrides> runs = {
      {"model.path=''", shapes, "model.train={steps: 3, batch_size: 4}", every, full, "router.init=random",
       "router.train=true", "router.bias=learned"},
      {"router.init=embedding", "train.dtype=bfloat16", "kernels=reference", "forward=per_expert"},
      {"router.init=centered", full, "norm_topk_prob=true", "train.optimizer=sgd", "train.momentum=0.5"},
      {"router.init=encoder", "router.encoder=" + (folder_ / "encoder").string()}};
  Overrides other = kOtherValues;
  std::erase(other, "model.save_dtype=bfloat16");
  for (size_t i = 0; i < runs.size(); ++i) {
    SCOPED_TRACE("run " + std::to_string(i));
    TinyRun run(recipe(), runs[i]);
    run.run();
    Overrides own = other;
    if (i == 0)
      own.insert(own.end(), {"model.path=''",
                             "model.architecture={vocab_size: 300, hidden_size: 12, intermediate_size: 8, "
                             "num_layers: 1, num_heads: 3}",
                             "model.train={steps: 1, batch_size: 2, learning_rate: 0.1}", "model.save_dtype=bfloat16"});
    if (i == 3) own.insert(own.end(), {"router.init=encoder", "router.encoder=" + (folder_ / "encoder").string()});
    own.push_back(i == 1 ? "train.dtype=float32" : "train.dtype=bfloat16");
    expect_same_artefacts(run, own, "other values everywhere");
  }
}

TEST_F(FlexMoreRun, AWorkerWithoutTheDomainOrWithAnotherModelRefuses) {
  TinyRun run(recipe(), {});
  run.run();
  const auto stranger = worker_with(run, {"domains=[{name: other, path: other.h5}]", "top_k=2"});
  const TinyRun elsewhere(recipe(), {"model.path=" + (folder_ / "model").string()});
  core::Json inputs = run.method().inputs();
  inputs["model"] = "dir:another";
  const auto differing = find_method("flexmore").restore(elsewhere.values(), inputs);
  for (const auto& unit : run.finished()) {
    if (unit.label != "train/left") continue;
    EXPECT_THAT(models::thrown<core::UserError>([&] { TinyRun::execute(*stranger, unit, run); }),
                HasSubstr("no domain 'left'"));
    EXPECT_THAT(models::thrown<core::UserError>([&] { TinyRun::execute(*differing, unit, run); }),
                HasSubstr("differs from the coordinator's"));
    Unit newer = unit;
    newer.spec["version"] = 99;
    EXPECT_THAT(models::thrown<core::UserError>([&] { TinyRun::execute(run.method(), newer, run); }),
                HasSubstr("version"));
    Unit wider = unit;
    wider.spec["dropout"] = 0.1;
    EXPECT_THAT(models::thrown<core::UserError>([&] { TinyRun::execute(run.method(), wider, run); }),
                HasSubstr("dropout"));
  }
}

TEST_F(FlexMoreRun, LogEveryChangesNeitherUnitsNorArtefacts) {
  const Overrides often = {"train.log_every=1", "train.checkpoint_every=1"};
  TinyRun rarely(recipe(), {}), often_logged(recipe(), often);
  rarely.run();
  often_logged.run();
  std::map<std::string, std::string> by_unit;
  for (const auto& unit : rarely.finished()) by_unit[unit.id()] = rarely.result(unit.id()).value();
  for (const auto& unit : often_logged.finished()) {
    ASSERT_TRUE(by_unit.count(unit.id())) << unit.label;
    EXPECT_EQ(often_logged.result(unit.id()), by_unit.at(unit.id())) << unit.label;
  }
}

// The names of the experts in a directory that publish() or export_as() wrote.
std::vector<std::string> experts_in(const std::filesystem::path& directory) {
  std::vector<std::string> names;
  for (const auto& expert : flexmore::read_mixture_directory(directory).mixture.experts) names.push_back(expert.name);
  return names;
}

TEST_F(FlexMoreRun, AnExpertThatIsLeftOutIsInNoResult) {
  const Overrides full = {"domains.2.train=full"};
  TinyRun everyone(recipe(), full);
  everyone.run();
  Overrides without = full;
  without.push_back("leave_out=[left]");
  TinyRun opted_out(recipe(), without);
  opted_out.adopt(everyone);
  std::set<std::string> new_kinds, new_labels;
  for (Plan plan = opted_out.method().plan(opted_out); !plan.pending.empty(); plan = opted_out.method().plan(opted_out))
    for (const auto& unit : plan.pending) {
      new_kinds.insert(unit.kind);
      if (unit.kind == "train_expert") new_labels.insert(unit.label);
      opted_out.accept(unit, TinyRun::execute(opted_out.method(), unit, opted_out));
    }
  EXPECT_THAT(new_labels, ElementsAre("train/joint")) << "other experts are what they were";

  const std::string theirs = everyone.made_by("train/left")->id(), cut = everyone.made_by("extract/left")->id();
  for (const auto& unit : opted_out.finished()) {
    EXPECT_EQ(std::count(unit.inputs.begin(), unit.inputs.end(), theirs), 0) << unit.label;
    EXPECT_EQ(std::count(unit.inputs.begin(), unit.inputs.end(), cut), 0) << unit.label;
    if (unit.kind == "train_expert") {
      EXPECT_THAT(unit.spec.at("data").dump(), Not(HasSubstr("\"left\""))) << unit.label;
    }
  }
  for (const char* merged : {"merge/mixture", "merge/full"}) {
    EXPECT_EQ(opted_out.made_by(merged)->meta().at("experts"), (core::Json{"code", "right"})) << merged;
    EXPECT_NE(opted_out.made_by(merged)->id(), everyone.made_by(merged)->id());
  }
  EXPECT_EQ(opted_out.made_by("merge/soup")->meta().at("of"), 2);
  opted_out.method().publish(opted_out, folder_.path());
  EXPECT_THAT(experts_in(folder_ / "mixture"), ElementsAre("code", "right"));
  for (const char* what : {"mixture", "full_mixture"}) {
    const auto out = folder_ / (std::string("exported_") + what);
    ExportRequest request;
    request.format = "flexolmo";
    request.directory = out;
    request.what = what;
    opted_out.method().export_as(opted_out, request);
    EXPECT_THAT(experts_in(out), ElementsAre("code", "right"));
  }

  const core::Json summary = opted_out.method().summary(opted_out);
  const core::Json& scores = summary.at("tables")[0];
  EXPECT_THAT(scores.at("notes").dump(), HasSubstr("left out: left"));
  for (const auto& row : scores.at("rows")) {
    if (row.at("domain") != "left") continue;
    EXPECT_EQ(row.at("rank"), "left out");
    EXPECT_FALSE(row.contains("expert"));
    EXPECT_TRUE(row.contains("mixture")) << "the text is still measured";
  }
  EXPECT_EQ(summary.at("hash"), opted_out.made_by("merge/mixture")->id());
}

TEST_F(FlexMoreRun, TablesAndMapsNameExpertsInTheRecipesOrder) {
  TinyRun run(recipe(), {});
  run.run();
  const core::Json summary = run.method().summary(run);
  int maps = 0;
  for (const auto& map : summary.at("heatmaps")) {
    const auto rows = map.at("rows").get<std::vector<std::string>>();
    if (map.at("title") == "Router load of the mixture, chosen ranks") {
      EXPECT_THAT(rows, ElementsAre("public", "right", "left", "code"));
      EXPECT_EQ(map.at("columns"), map.at("rows"));
      ++maps;
    } else if (map.at("title") == "Each expert on every domain, bits per byte") {
      EXPECT_THAT(rows, ElementsAre("public model", "right", "left", "code"));
      ++maps;
    }
  }
  EXPECT_EQ(maps, 2);
  // The numbers moved with their names: an artefact lists experts by name, its columns are code, left, right.
  const core::Json load = run.made_by("test/mixture/left")->meta().at("load");
  ASSERT_EQ(load.at("experts"), (core::Json{"public", "code", "left", "right"}));
  for (const auto& map : summary.at("heatmaps")) {
    if (map.at("title") != "Router load of the mixture, chosen ranks, by layer") continue;
    const core::Json& line = map.at("values")[4];  // text left, layer 0
    ASSERT_EQ(map.at("rows")[4], "left, layer 0");
    const std::vector<size_t> stored = {0, 3, 2, 1};
    for (size_t e = 0; e < 4; ++e)
      EXPECT_EQ(line[e].get<double>(), 100 * load.at("selected")[0][stored[e]].get<double>()) << e;
  }
}

TEST_F(FlexMoreRun, AnExpertTrainedAtItsRankIsNoFullSizeOne) {
  TinyRun run(recipe(), {"comparisons=[]"});
  run.run();
  const core::Json summary = run.method().summary(run);
  for (const auto& row : summary.at("tables")[0].at("rows")) {
    const bool direct = row.at("domain") == "code", open = row.at("domain") == "public";
    EXPECT_EQ(row.contains("expert"), !direct && !open) << row;
    EXPECT_EQ(row.contains("low_rank_expert"), !open) << row;
  }
}

TEST_F(FlexMoreRun, ABudgetThatNoChoiceOfRanksCanKeepIsRefusedBeforeAnythingIsTrained) {
  const auto open = [&](const Overrides& overrides) {
    return models::thrown<core::UserError>([&] { TinyRun(recipe(), overrides); });
  };
  const std::string refused = open({"ranks.budget=0.01"});
  EXPECT_THAT(refused, HasSubstr("ranks.budget"));
  const auto at = refused.find("raise it to ");
  ASSERT_NE(at, std::string::npos) << refused;
  const std::string least = refused.substr(at + 12, 6);
  EXPECT_EQ(open({"ranks.budget=" + least}), "") << "what the hint says is enough";
  EXPECT_EQ(open({"ranks.budget=0.01", "domains.0.rank=full"}), "") << "nothing is chosen";
  EXPECT_EQ(open({"ranks.budget=0.01", "leave_out=[right]"}), "") << "nothing is chosen";
}

TEST_F(FlexMoreRun, MisshapenResultsAreNotAccepted) {
  using flexmore::read_expert, flexmore::write_expert, flexmore::Expert;
  TinyRun run(recipe(), {});
  run.run();
  const auto refusal = [&](const Unit& unit, const core::ArtefactPtr& artefact) -> std::string {
    try {
      run.method().check_result(unit, *artefact);
    } catch (const core::UserError& error) {
      return error.what();
    }
    return "accepted";
  };
  std::map<std::string, int> kinds;
  for (const auto& unit : run.finished()) {
    const auto artefact = run.artefact(run.result(unit.id()).value());
    EXPECT_EQ(refusal(unit, artefact), "accepted") << unit.label;
    EXPECT_NE(refusal(unit, core::Artefact::create("other", {}, {})), "accepted") << unit.label;
    if (++kinds[unit.kind] > 1) continue;
    core::Json meta = artefact->meta();
    meta.erase("kind");
    if (unit.kind == "train_expert") {
      Expert expert = read_expert(*artefact, 0);
      const std::string name = expert.name;
      expert.name = "other";
      EXPECT_THAT(refusal(unit, write_expert(expert, meta)), HasSubstr("another name"));
      expert.name = name;
      meta["base"] = "other";
      EXPECT_THAT(refusal(unit, write_expert(expert, meta)), HasSubstr("another public model"));
      expert.layers.pop_back();
      expert.router_rows.pop_back();
      EXPECT_THAT(refusal(unit, write_expert(expert, artefact->meta())), HasSubstr("layers, the public model"));
    }
    if (unit.kind == "extract") {
      Expert expert = read_expert(*artefact, 1);
      EXPECT_THAT(refusal(unit, write_expert(expert, meta)), HasSubstr("is of rank 1, planned is"));
    }
    if (unit.kind == "evaluate") {
      meta["result"]["tokens"] = 0;
      EXPECT_THAT(refusal(unit, core::Artefact::create("evaluation", meta, {})), HasSubstr("impossible sums"));
    }
  }
  EXPECT_EQ(kinds.count("train_expert") + kinds.count("extract") + kinds.count("evaluate"), 3u);
}

}  // namespace
}  // namespace moraine::algorithms
