// Units of federations on a tiny model, executed in this thread: by whom, and what is accepted of it.
#include <atomic>
#include <cmath>
#include <map>

#include <ATen/TensorOperators.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "algorithms/federated/units.h"
#include "algorithms/language_model.h"
#include "algorithms/register.h"
#include "core/error.h"
#include "core/hdf5.h"
#include "data/byte_tokenizer.h"
#include "data/fingerprint.h"
#include "models/tensor_io.h"
#include "tests/models/random_tensors.h"
#include "tests/temporary_directory.h"
#include "worker/context.h"

namespace moraine::algorithms::federated {
namespace {

using testing::HasSubstr;

constexpr const char* kRecipe = R"(
name: tiny
method: fedit
model: {path: model}
domains: [{name: left, path: left.h5}, {name: right, path: right.h5}]
seq_len: 8
clients: {count: 3, partition: iid, per_round: 2}
rounds: 2
lora: {rank: 2, alpha: 4, target_modules: [q_proj]}
train: {steps: 2, batch_size: 2, learning_rate: 1e-2}
comparisons: [centralised, alone]
evaluation: {sequences: 2, batch_size: 2}
)";

class FederatedUnits : public testing::Test, public RunState {
 protected:
  FederatedUnits() {
    auto config = models::tiny_config(models::DecoderConfig::Family::kOlmo2);
    config.vocab_size = data::ByteTokenizer::kVocabSize;
    const auto model = models::Decoder::from_config(config, 1, at::kFloat);
    for (const char* name : {"model", "copy"})
      write_model_directory(folder_ / name, config.to_json(), {model.weights().begin(), model.weights().end()});
    write_text("left.h5", 1), write_text("right.h5", 2);
    write_text("left_copy.h5", 1), write_text("right_copy.h5", 2);
    folder_.write("recipe.yaml", kRecipe);
  }

  void write_text(const std::string& name, uint32_t state) {
    core::Hdf5File file(folder_ / name, core::Hdf5File::Mode::kCreate);
    for (const char* split : {"train", "validation", "test"}) {
      std::vector<uint16_t> tokens;
      for (int i = 0; i < 200; ++i) {
        state = state * 1664525 + 1013904223;
        tokens.push_back(static_cast<uint16_t>('a' + (state >> 24) % 6));
      }
      tokens.push_back(static_cast<uint16_t>(data::ByteTokenizer::kEndOfDocument));
      const auto size = static_cast<int64_t>(tokens.size());
      file.write<uint16_t>(std::string(split) + "/tokens", tokens, {size});
      file.write<int64_t>(std::string(split) + "/documents", std::vector<int64_t>{0, size}, {2});
    }
    file.set_attribute("format", "moraine-text-domain");
    file.set_attribute("format_version", 1);
    file.set_attribute("name", "tiny");
    file.set_attribute("tokenizer", data::ByteTokenizer::kName);
    file.set_attribute("vocab_size", data::ByteTokenizer::kVocabSize);
    file.set_attribute("fingerprint", data::text_fingerprint(file));
    file.close();
  }

  std::optional<std::string> result(const std::string& unit) const override {
    const auto it = results_.find(unit);
    return it == results_.end() ? std::nullopt : std::optional(it->second->id());
  }
  core::ArtefactPtr artefact(const std::string& id) const override { return artefacts_.at(id); }

  std::unique_ptr<Method> method(const std::vector<std::string>& overrides) {
    auto recipe = load_recipe(folder_ / "recipe.yaml", overrides);
    recipe.method->open_inputs();
    return std::move(recipe.method);
  }

  core::ArtefactPtr execute(const Method& by, const Unit& unit) {
    static const std::atomic<int> no_signals{0};
    worker::WorkerOptions options;
    worker::DirectContext context(unit, 1, options, no_signals,
                                  {.artefact = [&](const std::string& id) { return artefacts_.at(id); },
                                   .metric = [](const core::metrics::Record&) {},
                                   .progress = [](double, double) {}});
    return by.execute(unit, context);
  }

  // Runs everything, checks every result as a coordinator does, and returns the units.
  std::vector<Unit> run(const Method& of) {
    results_.clear();
    std::vector<Unit> units;
    for (Plan plan = of.plan(*this); !plan.pending.empty(); plan = of.plan(*this))
      for (const auto& unit : plan.pending) {
        const auto made = execute(of, unit);
        EXPECT_NO_THROW(of.check_result(unit, *made)) << unit.label;
        results_[unit.id()] = made;
        artefacts_[made->id()] = made;
        units.push_back(unit);
      }
    EXPECT_EQ(of.missing_result(*this), std::nullopt);
    return units;
  }

  Unit first(const std::vector<Unit>& units, const std::string& kind) {
    for (const auto& unit : units)
      if (unit.kind == kind) return unit;
    throw core::InternalError("no unit of kind " + kind);
  }

  TemporaryDirectory folder_;
  std::map<std::string, core::ArtefactPtr> results_, artefacts_;
};

// Every key of a recipe another way, which the recipe of its own process must not bring into a unit it was leased.
TEST_F(FederatedUnits, RunTheirSpecificationWhateverTheWorkersOwnRecipeSays) {
  const std::vector<std::string> keys = {
      "name=other",
      "seed=9",
      "workers.local=7",
      "workers.retries=1",
      "model.path=" + (folder_ / "copy").string(),
      fmt::format("domains=[{{name: right, path: {0}/right_copy.h5}}, {{name: left, path: {0}/left_copy.h5}}]",
                  folder_.path().string()),
      "seq_len=6",
      "clients.count=4",
      "clients.partition=dirichlet",
      "clients.alpha=9",
      "clients.per_round=0",
      "clients.min_per_round=1",
      "rounds=3",
      "lora.rank=3",
      "lora.alpha=1",
      "lora.target_modules=[v_proj]",
      "lora.init=gaussian",
      "lora.use_rslora=true",
      "train.steps=3",
      "train.batch_size=3",
      "train.micro_batch_size=1",
      "train.optimizer=sgd",
      "train.learning_rate=0.5",
      "train.beta1=0.5",
      "train.beta2=0.5",
      "train.epsilon=0.1",
      "train.momentum=0.5",
      "train.weight_decay=0.5",
      "train.schedule=constant",
      "train.final_lr_ratio=0.9",
      "train.warmup_steps=1",
      "train.clip_norm=0.001",
      "train.dtype=bfloat16",
      "train.checkpoint_every=1",
      "train.log_every=1",
      "comparisons=[]",
      "evaluation.sequences=1",
      "evaluation.batch_size=1",
      "evaluation.every=2",
      "evaluation.split=validation"};
  const std::map<std::string, std::vector<std::string>> of_method = {
      {"fedit", {"server.optimizer=fedadam", "server.learning_rate=0.5", "clients.weighting=uniform"}},
      {"ffa_lora", {"server.optimizer=fedavgm", "server.beta1=0.1"}},
      {"flora", {"clients.ranks=[1]"}},
      {"fedex_lora", {"clients.weighting=uniform"}},
      {"hetlora", {"clients.ranks=[1]", "pruning.gamma=0.1", "pruning.lambda=7", "pruning.min_rank=2"}}};
  for (const auto& [name, own] : of_method) {
    std::vector<std::string> base = {"method=" + name};
    if (name == "flora" || name == "hetlora") base.push_back("clients.ranks=[2, 1]");
    if (name == "hetlora") base.push_back("pruning.gamma=0.5");
    if (name == "fedit") base.push_back("server.optimizer=fedavgm");  // states are cut to what is sent
    const auto units = run(*method(base));
    std::vector<std::string> changes = own;
    if (name == "fedit") changes.insert(changes.end(), keys.begin(), keys.end());
    if (name != "fedit") changes.insert(changes.end(), {"seed=9", "lora.rank=3", "lora.alpha=1", "train.steps=3"});
    for (const auto& change : changes) {
      std::vector<std::string> overrides = base;
      overrides.push_back(change);
      const auto other = method(overrides);
      for (const auto& unit : units)
        EXPECT_EQ(execute(*other, unit)->id(), results_.at(unit.id())->id())
            << name << ": " << unit.label << " by a worker with " << change;
    }
  }
}

TEST_F(FederatedUnits, OfAnotherMethodOrAnotherModelAreRefused) {
  const Unit unit = first(run(*method({})), "client_update");
  const auto refusal = [&](const std::vector<std::string>& overrides, const Unit& asked) -> std::string {
    try {
      execute(*method(overrides), asked);
    } catch (const core::UserError& error) {
      return error.what();
    }
    return "executed";
  };
  EXPECT_THAT(refusal({"method=ffa_lora"}, unit), HasSubstr("the unit is of method fedit, this worker runs ffa_lora"));
  Unit changed = unit;
  changed.spec["base"] = "dir:other";
  EXPECT_THAT(refusal({}, changed), HasSubstr("differs from the coordinator's"));
  changed = unit;
  changed.spec.erase("rank");
  EXPECT_THAT(refusal({}, changed), HasSubstr("rank"));
  changed = unit;
  changed.spec["shares"][0]["data"]["fingerprint"] = std::string(64, 'z');
  EXPECT_THAT(refusal({}, changed), HasSubstr("changed since the run was planned"));
}

TEST_F(FederatedUnits, KeysThatChangeNoResultChangeNoIds) {
  run(*method({}));
  for (const char* change : {"train.log_every=1", "train.checkpoint_every=1", "workers.local=3", "name=other"})
    EXPECT_TRUE(method({change})->plan(*this).pending.empty()) << change;
  // What the base scores depends on no adapter and no client.
  for (const char* change : {"lora.rank=3", "seed=9", "train.steps=3", "server.optimizer=fedadam"})
    for (const auto& unit : method({change})->plan(*this).pending)
      EXPECT_FALSE(unit.label.starts_with("test/base")) << unit.label << " " << change;
}

TEST_F(FederatedUnits, MisshapenContributionsAreNotAccepted) {
  const auto fedit = method({});
  const Unit unit = first(run(*fedit), "client_update");
  const core::ArtefactPtr good = results_.at(unit.id());
  const auto refusal = [&](const core::Json& meta, const models::NamedTensors& tensors,
                           const std::string& kind = "update") -> std::string {
    std::vector<at::Tensor> keep;
    try {
      fedit->check_result(unit, *core::Artefact::create(kind, meta, models::views_of(tensors, keep)));
    } catch (const core::UserError& error) {
      return error.what();
    }
    return "accepted";
  };
  models::NamedTensors tensors;
  for (const auto& view : good->file().tensors()) tensors.emplace_back(view.name, models::copy_of(view));
  core::Json meta = good->meta();
  meta.erase("kind");
  EXPECT_EQ(refusal(meta, tensors), "accepted");
  const std::map<std::string, core::Json> wrong = {{"client", "client-9"}, {"round", 5}, {"samples", 100000},
                                                   {"base", "dir:other"},  {"rank", 1},  {"rank", "two"}};
  for (const auto& [key, value] : wrong) {
    core::Json changed = meta;
    changed[key] = value;
    EXPECT_NE(refusal(changed, tensors), "accepted") << key;
  }
  EXPECT_THAT(refusal(meta, tensors, "adapter"), HasSubstr("is of kind 'adapter'"));
  auto changed = tensors;
  changed.pop_back();
  EXPECT_THAT(refusal(meta, changed), HasSubstr("lacks the tensor"));
  changed = tensors;
  changed.emplace_back("model.more", tensors[0].second);
  EXPECT_THAT(refusal(meta, changed), HasSubstr("that nobody asked for"));
  changed = tensors;
  changed[0].second = changed[0].second.to(at::kDouble);
  EXPECT_THAT(refusal(meta, changed), HasSubstr("planned is float32"));
  changed = tensors;
  changed[0].second = changed[0].second.narrow(0, 0, 1);
  EXPECT_THAT(refusal(meta, changed), HasSubstr("planned is float32 ["));
  changed = tensors;
  changed[0].second = changed[0].second / 0;
  EXPECT_THAT(refusal(meta, changed), HasSubstr("not finite"));
  EXPECT_THAT(refusal({{"client", meta.at("client")}, {"round", meta.at("round")}, {"refused", "bad day"}}, {}),
              HasSubstr("refuses what it was not asked to"));
}

// A missing file is a site's own trouble: the attempt fails, and nothing of it becomes a result.
TEST_F(FederatedUnits, ASitesOwnTroubleIsNoRefusalOfATolerantRound) {
  const auto fedit = method({"clients.min_per_round=1"});
  const Plan plan = fedit->plan(*this);
  const Unit unit = first(plan.pending, "client_update");
  Unit tolerant = unit;
  tolerant.spec["tolerant"] = true;
  std::filesystem::remove(folder_ / "left.h5");
  EXPECT_THROW(execute(*fedit, tolerant), core::UserError);
}

// Numbers that go bad are this specification's result, wherever it runs, and say nothing of the host.
TEST_F(FederatedUnits, NumbersThatGoBadAreARefusalOfATolerantRoundAndElseAnError) {
  // The first step's factors of 1e37 times a scale of 2e4 are more than float32 holds.
  const auto fedit = method({"clients.min_per_round=1", "train.learning_rate=1e37", "lora.alpha=4e4", "train.steps=4",
                             "train.clip_norm=0", "comparisons=[]"});
  Unit unit = first(fedit->plan(*this).pending, "client_update");
  ASSERT_EQ(unit.spec.at("tolerant"), true);
  const auto refusal = execute(*fedit, unit);
  EXPECT_EQ(refusal->meta().at("refused"), "its training gave numbers that are not finite");
  EXPECT_NO_THROW(fedit->check_result(unit, *refusal));
  unit.spec["tolerant"] = false;
  EXPECT_THROW(execute(*fedit, unit), core::NumericError);
  EXPECT_THROW(fedit->check_result(unit, *refusal), core::UserError);
}

// Of a model whose base changes every round, a client lacks all changes since its last turn.
TEST_F(FederatedUnits, ClientsAreCountedAsSentEveryChangeOfTheBaseTheyLack) {
  for (const char* name : {"flora", "fedex_lora"}) {
    const auto of = method({fmt::format("method={}", name), "clients.per_round=1", "rounds=5", "comparisons=[]"});
    const auto units = run(*of);
    std::map<std::string, size_t> seen;
    size_t sent = 0, last_alone = 0, states = 0, turns = 0;
    for (const auto& unit : units) {
      if (unit.kind != "client_update") continue;
      size_t& known = seen[unit.spec.at("client").get<std::string>()];
      for (size_t i = known; i < unit.inputs.size(); ++i) sent += artefacts_.at(unit.inputs[i])->bytes().size();
      states += unit.inputs.size() - known;
      turns += unit.spec.at("round") > 0;
      known = unit.inputs.size();
      if (known > 0) last_alone += artefacts_.at(unit.inputs.back())->bytes().size();
    }
    EXPECT_GT(sent, last_alone) << "some client of " << name << " must have missed a round";
    const auto summary = of->summary(*this);
    for (const auto& table : summary.at("tables"))
      if (table.at("title") == "Bytes up and down") {
        EXPECT_EQ(table.at("rows").back().at("down"), sent) << name;
      }
    const auto row = of->parameters().rows.at(0);
    const int64_t sides = row[1].get<int64_t>() / 2;  // the adapter has rank 2, and so has every round's one change
    const auto changes = std::llround(2.0 * static_cast<double>(states) / static_cast<double>(turns));
    EXPECT_EQ(row[4], (changes + (std::string(name) == "flora" ? 0 : 2)) * sides) << name;
  }
}

}  // namespace
}  // namespace moraine::algorithms::federated
