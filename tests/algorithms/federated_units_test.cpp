// Units of federations on a tiny model, executed in this thread: by whom, and what is accepted of it.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <map>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "algorithms/adapters/adapter.h"
#include "algorithms/federated/units.h"
#include "algorithms/language_model.h"
#include "algorithms/register.h"
#include "core/error.h"
#include "core/hash.h"
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
      "lora.type=dora",
      "lora.dropout=0.5",
      "lora.lr_ratio=4",
      "clients.proximal=0.5",
      "server.beta2=0.5",
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
      {"flexlora", {"clients.ranks=[1]"}},
      {"hetlora", {"clients.ranks=[1]", "pruning.gamma=0.1", "pruning.lambda=7", "pruning.min_rank=2"}}};
  for (const auto& [name, own] : of_method) {
    std::vector<std::string> base = {"method=" + name};
    if (name == "flora" || name == "flexlora" || name == "hetlora") base.push_back("clients.ranks=[2, 1]");
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

/// Types of adapters as the tiny model has room for them, by what they are called here.
const std::map<std::string, std::vector<std::string>> kTypes = {
    {"lora", {}},
    {"rslora", {"lora.use_rslora=true", "lora.alpha=3"}},
    {"ranks", {"lora.rank_pattern=[{module: down_proj, rank: 3}]"}},
    {"pissa", {"lora.init=pissa"}},
    {"olora", {"lora.init=olora"}},
    {"dora", {"lora.type=dora"}},
    {"dylora", {"lora.type=dylora"}},
    {"matryoshka", {"lora.type=matryoshka"}},
    {"matryoshka_as_trained", {"lora.type=matryoshka", "lora.options={as_trained: true}"}},
    {"eva", {"lora.init=eva"}},
    {"shira_grad", {"lora.type=shira", "lora.alpha=8", "lora.options={mask: grad}"}},
    {"vera", {"lora.type=vera", "lora.alpha=8"}},
    {"lora_xs", {"lora.type=lora_xs"}},
    {"nola", {"lora.type=nola", "lora.options={bases: 8}"}},
    {"shira", {"lora.type=shira", "lora.alpha=8"}},
    {"shira_wm", {"lora.type=shira", "lora.alpha=8", "lora.options={mask: wm}"}},
    {"compacter", {"lora.type=compacter", "lora.rank=8", "lora.alpha=8"}},
    {"adaptertune", {"lora.type=adaptertune", "lora.alpha=8", "lora.target_modules=[all-linear]"}},
    {"ia3", {"lora.type=ia3", "lora.rank=8", "lora.alpha=8"}},
    {"bitfit", {"lora.type=bitfit", "lora.rank=8", "lora.alpha=8"}},
    {"lora_sb", {"lora.type=lora_sb", "lora.alpha=8"}},
};

using Refusals = std::map<std::string, std::string>;  // by type

/// Beside `own`, of types that start from examples, which no method gives.
Refusals with_examples(Refusals own) {
  for (const char* type : {"lora_sb", "eva", "shira_grad"}) own[type] = "starts from examples";
  return own;
}
/// Beside `own`, of types whose change is no product of factors.
Refusals without_factors(Refusals own) {
  for (const std::string type : {"dora", "shira", "compacter", "adaptertune", "ia3", "bitfit"})
    own[type] = "type " + type + " is no product of factors";
  own["shira_wm"] = own["shira"];
  return own;
}

/// What each method says to types that it is not for, by a part of the message.
const std::map<std::string, Refusals> kRefused = {
    {"fedit", with_examples({})},
    {"ffa_lora", with_examples({{"lora_xs", "averages exactly as it is"},
                                {"shira", "averages exactly as it is"},
                                {"shira_wm", "averages exactly as it is"},
                                {"ia3", "averages exactly as it is"},
                                {"bitfit", "averages exactly as it is"},
                                {"dora", "type dora is no product of factors"},
                                {"compacter", "type compacter is no product of factors"},
                                {"adaptertune", "type adaptertune is no product of factors"}})},
    {"flora", with_examples(without_factors({}))},
    {"fedex_lora", with_examples(without_factors({{"lora_xs", "averaging loses nothing of type lora_xs"}}))},
    {"flexlora", with_examples({{"ranks", "is no free pair of factors"},
                                {"pissa", "is no free pair of factors"},
                                {"olora", "is no free pair of factors"},
                                {"dora", "is no free pair of factors"},
                                {"vera", "is no free pair of factors"},
                                {"lora_xs", "is no free pair of factors"},
                                {"nola", "is no free pair of factors"},
                                {"shira", "is no free pair of factors"},
                                {"shira_wm", "is no free pair of factors"},
                                {"compacter", "is no free pair of factors"},
                                {"adaptertune", "is no free pair of factors"},
                                {"ia3", "is no free pair of factors"},
                                {"bitfit", "is no free pair of factors"},
                                {"dylora", "is no free pair of factors"},
                                {"matryoshka", "is no free pair of factors"},
                                {"matryoshka_as_trained", "is no free pair of factors"}})},
    {"hetlora", with_examples({{"matryoshka_as_trained", "as_trained weighs them by the rank they are among"},
                               {"ranks", "has no first ranks"},
                               {"pissa", "that starts from the base has no first ranks"},
                               {"olora", "that starts from the base has no first ranks"},
                               {"dora", "has no first ranks"},
                               {"vera", "has no first ranks"},
                               {"lora_xs", "has no first ranks"},
                               {"nola", "has no first ranks"},
                               {"shira", "has no first ranks"},
                               {"shira_wm", "has no first ranks"},
                               {"compacter", "has no first ranks"},
                               {"adaptertune", "has no first ranks"},
                               {"ia3", "has no first ranks"},
                               {"bitfit", "has no first ranks"}})},
};

class EveryTypeInRounds : public FederatedUnits, public testing::WithParamInterface<std::string> {
 protected:
  std::vector<std::string> recipe_of(const std::string& type) const {
    std::vector<std::string> keys = {"method=" + GetParam(), "lora.target_modules=[q_proj, down_proj]"};
    keys.insert(keys.end(), kTypes.at(type).begin(), kTypes.at(type).end());
    return keys;
  }

  /// By slot, in float64, the change that an adapter with an aggregation's start, if any, and these tensors is.
  std::map<std::string, at::Tensor> dense_change(const Unit& aggregation, const core::Artefact& made) {
    const at::NoGradGuard no_grad;
    const AggregateSpec spec = core::from_spec(aggregate_schema(), aggregation.spec);
    const auto model = models::Decoder::from_directory(folder_ / "model", at::kFloat);
    const uint64_t seed =
        made.meta().value("seed", core::derive_seed(static_cast<uint64_t>(spec.adapter.seed), "adapter"));
    const auto adapter = adapters::Adapter::blank(spec.adapter.lora, model, seed, at::kCPU);
    models::NamedTensors own = adapter.parameters();
    for (auto& entry : adapter.state()) own.push_back(entry);
    for (auto& [name, tensor] : own) {
      const core::TensorView* view = made.file().find(name);
      if (view == nullptr) view = artefacts_.at(aggregation.inputs.at(0))->file().find(name);
      tensor.copy_(models::copy_of(*view));
    }
    std::map<std::string, at::Tensor> changes;
    for (size_t i = 0; i < adapter.targets().size(); ++i) {
      const auto& path = adapter.targets()[i].slot.path;
      changes[path] = adapter.function(i).delta(model.base(path))->to(at::kDouble);
    }
    return changes;
  }

  std::vector<core::ArtefactPtr> contributions_to(const Unit& aggregation) {
    const size_t clients = aggregation.spec.at("clients").size();
    std::vector<core::ArtefactPtr> all;
    for (size_t i = aggregation.inputs.size() - clients; i < aggregation.inputs.size(); ++i)
      all.push_back(artefacts_.at(aggregation.inputs[i]));
    return all;
  }

  /// sum_k p_k x_k of every tensor that was sent, in a loop over float64, and nothing else but the server's own.
  void expect_means(const core::Artefact& state, const std::vector<core::ArtefactPtr>& sent) {
    const auto weights = state.meta().at("weights").get<std::vector<double>>();
    for (const auto& view : sent.front()->file().tensors()) {
      ASSERT_NE(state.file().find(view.name), nullptr) << view.name;
      std::vector<double> mean(static_cast<size_t>(view.numel()));
      for (size_t k = 0; k < sent.size(); ++k) {
        const at::Tensor value = models::copy_of(*sent[k]->file().find(view.name)).flatten();
        for (size_t i = 0; i < mean.size(); ++i)
          mean[i] += weights[k] * static_cast<double>(value[static_cast<int64_t>(i)].item<float>());
      }
      const at::Tensor has = models::copy_of(*state.file().find(view.name)).flatten();
      for (size_t i = 0; i < mean.size(); ++i)  // rounded to float32 once
        ASSERT_FLOAT_EQ(has[static_cast<int64_t>(i)].item<float>(), static_cast<float>(mean[i])) << view.name;
    }
    for (const auto& view : state.file().tensors())
      EXPECT_TRUE(sent.front()->file().find(view.name) != nullptr || view.name.find(".base_") != std::string::npos)
          << view.name;
  }

  /// What a round adds to the base, and the global adapter if it has one, are the mean of the clients' changes.
  void expect_exact(const Unit& aggregation) {
    const core::ArtefactPtr state = results_.at(aggregation.id());
    const auto weights = state->meta().at("weights").get<std::vector<double>>();
    std::map<std::string, at::Tensor> wanted, has;
    const auto add = [](std::map<std::string, at::Tensor>& to, const std::string& slot, const at::Tensor& change) {
      to[slot] = to.contains(slot) ? to[slot] + change : change;
    };
    const auto sent = contributions_to(aggregation);
    for (size_t k = 0; k < sent.size(); ++k)
      for (const auto& [slot, change] : dense_change(aggregation, *sent[k])) add(wanted, slot, change * weights[k]);
    if (GetParam() == "fedex_lora") has = dense_change(aggregation, *state);
    for (const auto& [slot, unused] : wanted) {
      const at::Tensor b = models::copy_of(*state->file().find(slot + ".base_B")).to(at::kDouble);
      const at::Tensor a = models::copy_of(*state->file().find(slot + ".base_A")).to(at::kDouble);
      add(has, slot, b.matmul(a));
    }
    // Changes of types that start from the base are differences of products about as large as the weights.
    for (const auto& [slot, change] : wanted)
      EXPECT_LT((has.at(slot) - change).abs().max().item<double>(), 2e-6) << slot;
  }
};

TEST_P(EveryTypeInRounds, IsAveragedAsItsMethodSaysOrRefusedByName) {
  for (const auto& [type, keys] : kTypes) {
    SCOPED_TRACE(type);
    const auto refused = kRefused.at(GetParam()).find(type);
    if (refused != kRefused.at(GetParam()).end()) {
      EXPECT_THAT(models::thrown<core::UserError>([&] { method(recipe_of(type)); }), HasSubstr(refused->second));
      continue;
    }
    const auto of = method(recipe_of(type));
    for (const Unit& unit : run(*of)) {
      if (unit.kind != AggregateSpec::kKind) continue;
      const auto sent = contributions_to(unit);
      const auto moved = [&](const core::TensorView& one) {
        return !models::same_bits(models::copy_of(one), models::copy_of(*sent[1]->file().find(one.name)));
      };
      ASSERT_TRUE(std::ranges::any_of(sent[0]->file().tensors(), moved)) << "clients must differ";
      if (GetParam() == "fedit" || GetParam() == "ffa_lora" || GetParam() == "fedex_lora")
        expect_means(*results_.at(unit.id()), sent);
      if (GetParam() == "flora" || GetParam() == "fedex_lora") expect_exact(unit);
    }
    // What is counted before a run is what travels in it.
    const auto row = of->parameters().rows.at(0);
    for (const auto& [id, artefact] : artefacts_) {
      if (artefact->kind() != "update" || (row[0] != "none" && artefact->meta().at("rank") != row[0])) continue;
      int64_t numbers = 0;
      for (const auto& view : artefact->file().tensors()) numbers += view.numel();
      EXPECT_EQ(row[3], numbers);
    }
    artefacts_.clear();
  }
}

// The mean of one contribution is that contribution: the global model after a round, however it is put together, scores
// what the client's own does.
TEST_P(EveryTypeInRounds, OfOneClientIsThatClientsModel) {
  for (const auto& [type, keys] : kTypes) {
    if (kRefused.at(GetParam()).contains(type)) continue;
    SCOPED_TRACE(type);
    auto recipe = recipe_of(type);
    recipe.insert(recipe.end(), {"clients.count=1", "clients.per_round=1", "rounds=1", "comparisons=[alone]"});
    const auto units = run(*method(recipe));
    std::map<std::string, double> nats;
    for (const auto& unit : units)
      if (unit.kind == EvaluateSpec::kKind)
        nats[unit.label] = results_.at(unit.id())->meta().at("result").at("nats").get<double>();
    EXPECT_NE(nats.at("test/1/left"), nats.at("test/base/left"));
    // Merged into float32 weights or beside them.
    EXPECT_NEAR(nats.at("test/1/left"), nats.at("test/alone/client-1/left"), 1e-5 * nats.at("test/1/left"));
    artefacts_.clear();
  }
}

INSTANTIATE_TEST_SUITE_P(Federations, EveryTypeInRounds,
                         testing::Values("fedit", "ffa_lora", "flora", "fedex_lora", "flexlora", "hetlora"),
                         [](const auto& one) { return one.param; });

// Of two steps of plain gradient descent the first starts at the global adapter, where the pull is zero; in the second
// it is mu (w - x), and B starts at x = 0.
TEST_F(FederatedUnits, FedProxPullsTowardsTheGlobalAdapter) {
  const auto client = [&](const char* steps, const char* mu) {
    const auto of = method({"train.optimizer=sgd", "train.momentum=0", "train.clip_norm=0", "train.weight_decay=0",
                            "train.schedule=constant", "train.warmup_steps=0", "train.learning_rate=0.5", steps, mu,
                            "comparisons=[]"});
    const auto made = execute(*of, first(of->plan(*this).pending, "client_update"));
    for (const auto& view : made->file().tensors())
      if (view.name.ends_with("lora_B.weight")) return models::copy_of(view).to(at::kDouble);
    throw core::InternalError("no lora_B");
  };
  const at::Tensor one = client("train.steps=1", "clients.proximal=0"),
                   two = client("train.steps=2", "clients.proximal=0"),
                   pulled = client("train.steps=2", "clients.proximal=0.25");
  EXPECT_GT(one.abs().max().item<double>(), 1e-4);
  EXPECT_TRUE(models::same_bits(one, client("train.steps=1", "clients.proximal=0.25")));
  EXPECT_LT(models::relative_error(pulled, two - one * (0.5 * 0.25)), 1e-5);
}

TEST_F(FederatedUnits, ComparisonsHaveNoGlobalAdapterToBePulledTo) {
  const auto units = run(*method({"clients.proximal=0.25", "comparisons=[centralised, alone]"}));
  size_t alone = 0;
  for (const Unit& unit : units) {
    if (unit.kind != UpdateSpec::kKind) continue;
    const bool of_round = !unit.label.starts_with("train/alone/") && unit.label != "train/centralised";
    alone += of_round ? 0 : 1;
    EXPECT_EQ(unit.spec.contains("proximal"), of_round) << unit.label;
  }
  EXPECT_GT(alone, 1u);
}

TEST_F(FederatedUnits, RanksThatATypeDoesNotHaveAreRefused) {
  const auto refusal = [&](const std::vector<std::string>& keys) {
    return models::thrown<core::UserError>([&] { method(keys); });
  };
  EXPECT_THAT(refusal({"method=flora", "clients.ranks=[2, 1]", "lora.rank_pattern=[{module: q_proj, rank: 1}]"}),
              HasSubstr("one rank in all modules"));
  EXPECT_THAT(refusal({"method=flora", "clients.ranks=[2, 1]", "lora.type=matryoshka", "lora.options={ranks: [1, 2]}"}),
              HasSubstr("at rank 1: options.ranks"));
  EXPECT_THAT(refusal({"method=hetlora", "pruning.min_rank=1", "lora.type=dylora", "lora.options={min_rank: 2}"}),
              HasSubstr("at rank 1: options.min_rank"));
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
    const auto sides =
        static_cast<size_t>(row[1].get<int64_t>() / 2);  // the adapter has rank 2, and so has every round's one change
    const auto changes = std::llround(2.0 * static_cast<double>(states * sides) / static_cast<double>(turns));
    EXPECT_EQ(row[4].get<size_t>(), static_cast<size_t>(changes) + (std::string(name) == "flora" ? 0 : 2 * sides))
        << name;
  }
}

}  // namespace
}  // namespace moraine::algorithms::federated
