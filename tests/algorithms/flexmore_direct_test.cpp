// Experts that are trained as adapters, against the adapters themselves.
#include <algorithm>
#include <map>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/full.h>
#include <ATen/ops/matmul.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "algorithms/flexmore/direct.h"
#include "algorithms/flexmore/experts.h"
#include "algorithms/flexmore/mixture_files.h"
#include "algorithms/language_model.h"
#include "core/error.h"
#include "data/byte_tokenizer.h"
#include "tests/algorithms/adapter_cases.h"
#include "tests/algorithms/tiny_run.h"
#include "tests/models/random_tensors.h"
#include "tests/temporary_directory.h"

namespace moraine::algorithms::flexmore {
namespace {

using adapters::AdapterConfig;
using adapters::Change;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

models::Decoder public_model() {
  return models::Decoder::from_config(models::tiny_config(models::DecoderConfig::Family::kOlmo2), 3, at::kFloat);
}

std::vector<const adapters::Parametrisation*> types_with(const std::vector<Change>& changes) {
  std::vector<const adapters::Parametrisation*> types;
  for (const auto* type : adapters::parametrisations()) {
    adapters::AdapterConfig config;
    config.type = type->name();
    if (std::ranges::count(changes, type->change(config))) types.push_back(type);
  }
  return types;
}

/// A type's adapter of an expert of the tiny model, every trained number moved.
adapters::Adapter trained(const core::Json& fields, const models::Decoder& model) {
  return adapters::trained_adapter(on_ffn(adapters::checked_config(fields)), model);
}

core::Json small(const adapters::Parametrisation& type) {
  core::Json fields = {{"type", type.name()}};
  if (type.traits().uses_rank) fields["rank"] = 4;
  return fields;
}

/// Every configuration that may become an expert.
std::vector<core::Json> configurations() {
  std::vector<core::Json> all;
  for (const auto* type : types_with({Change::kFactors, Change::kDense})) all.push_back(small(*type));
  all.push_back({{"type", "lora"}, {"rank", 3}, {"alpha", 5}, {"use_rslora", true}});
  all.push_back({{"type", "lora"}, {"rank", 3}, {"init", "pissa"}});
  all.push_back({{"type", "lora"}, {"rank", 3}, {"init", "olora"}, {"alpha", 2}});
  return all;
}

Mixture mixture_of(const models::Decoder& model, const std::vector<models::FfnExpert>& layers) {
  const int64_t d = model.config().hidden_size;
  Mixture mixture;
  Expert expert{"one", layers, {}, {}};
  for (size_t l = 0; l < layers.size(); ++l) {
    mixture.public_rows.push_back(models::random_tensor({d}, 10 + l).to(at::kFloat));
    expert.router_rows.push_back(models::random_tensor({d}, 20 + l).to(at::kFloat));
  }
  mixture.experts = {expert};
  return mixture;
}

at::Tensor logits_of(const models::Decoder& model, const std::vector<models::FfnExpert>& layers) {
  const at::NoGradGuard no_grad;
  models::Decoder mixed = model.share();
  attach(mixed, mixture_of(model, layers), {});
  return mixed.forward(models::random_tokens(2, 7, model.config().vocab_size, 4));
}

TEST(DirectExperts, ComputeWhatTheirAdapterComputedInTraining) {
  const models::Decoder model = public_model();
  const at::Tensor before = model.share().forward(models::random_tokens(2, 7, model.config().vocab_size, 4));
  for (const core::Json& fields : configurations()) {
    SCOPED_TRACE(fields.dump());
    const adapters::Adapter adapter = trained(fields, model);
    const at::Tensor as_adapter = logits_of(model, adapted_layers(adapter, model));
    EXPECT_GT(models::relative_error(as_adapter, before), 1e-3) << "the adapter does nothing";
    const auto layers = expert_layers(adapter, model);
    // float32 on both sides, where only the order of sums differs.
    EXPECT_LT(models::relative_error(logits_of(model, layers), as_adapter), 2e-5);
    DomainConfig domain;
    domain.train = "direct", domain.adapter = adapter.config();
    EXPECT_EQ(layers.front().rank(), trained_rank(domain));
  }
}

TEST(DirectExperts, HaveTheFactorsOfTheirChangeWithTheScaleInB) {
  const models::Decoder model = public_model();
  for (const auto* type : types_with({Change::kFactors})) {
    SCOPED_TRACE(type->name());
    const adapters::Adapter adapter = trained(small(*type), model);
    const auto layers = expert_layers(adapter, model);
    for (const auto& [name, delta] : adapter.deltas(model))
      for (size_t l = 0; l < layers.size(); ++l)
        for (const auto& [matrix, pair] :
             {std::pair("gate_proj", layers[l].gate_delta), std::pair("up_proj", layers[l].up_delta),
              std::pair("down_proj", layers[l].down_delta)})
          if (name == ffn_slot(l) + "." + matrix + ".weight") {
            EXPECT_LT(models::relative_error(at::matmul(pair.b.to(at::kDouble), pair.a.to(at::kDouble)),
                                             delta.detach().to(at::kDouble)),
                      1e-5)
                << name;
          }
  }
}

TEST(DirectExperts, TraitsSayWhatAChangeIs) {
  const models::Decoder model = public_model();
  for (const auto* type : adapters::parametrisations()) {
    SCOPED_TRACE(type->name());
    const adapters::Adapter adapter = adapters::trained_adapter(adapters::checked_config(small(*type)), model);
    const models::SlotBase& base = model.base(adapter.targets().front().slot.path);
    const auto factored = adapter.function(0).factored(base);
    const auto delta = adapter.function(0).delta(base);
    const bool changes = delta && delta->abs().max().item<float>() > 0;
    const Change found = factored                                         ? Change::kFactors
                         : changes                                        ? Change::kDense
                         : adapter.function(0).bias_delta(base).defined() ? Change::kBias
                                                                          : Change::kNone;
    EXPECT_EQ(found, type->change(adapter.config()));
  }
}

TEST(DirectExperts, OfNestedTypesAreCutAsTheAdapterIs) {
  const models::Decoder model = public_model();
  for (const char* type : {"dylora", "matryoshka", "lora"})
    for (const bool rank_stabilised : {false, true}) {
      SCOPED_TRACE(type);
      const adapters::Adapter adapter =
          trained({{"type", type}, {"rank", 4}, {"alpha", 6}, {"use_rslora", rank_stabilised}}, model);
      Expert expert = mixture_of(model, expert_layers(adapter, model)).experts.front();
      expert.scales_by_rank = scales_by_rank(adapter.config());
      EXPECT_EQ(expert.scales_by_rank.size(), std::string(type) == "lora" ? 0u : 4u);
      const auto artefact = write_expert(expert, {{"base", "none"}});
      for (const int64_t rank : {1, 2, 3, 4}) {
        const auto cut = read_expert(*artefact, rank).layers;
        EXPECT_EQ(cut.front().rank(), rank);
        const auto expected = expert_layers(adapter.truncated(rank, model), model);
        for (size_t l = 0; l < cut.size(); ++l)
          for (const auto member :
               {&models::FfnExpert::gate_delta, &models::FfnExpert::up_delta, &models::FfnExpert::down_delta}) {
            EXPECT_TRUE(models::same_bits((cut[l].*member).a, (expected[l].*member).a));
            // Two scales instead of one: two roundings.
            EXPECT_LT(models::relative_error((cut[l].*member).b, (expected[l].*member).b), 1e-6);
          }
      }
    }
}

TEST(DirectExperts, WithScalesThatAreNoneAreRefused) {
  const models::Decoder model = public_model();
  const adapters::Adapter adapter = trained({{"type", "matryoshka"}, {"rank", 4}}, model);
  Expert expert = mixture_of(model, expert_layers(adapter, model)).experts.front();
  for (const std::vector<double>& scales : {std::vector<double>{1, 1}, {1, 1, 0, 1}, {1, 1, -2, 1}}) {
    expert.scales_by_rank = scales;
    const auto artefact = write_expert(expert, {{"base", "none"}});
    EXPECT_THAT(models::thrown<core::UserError>([&] { read_expert(*artefact, 2); }),
                HasSubstr("scales_by_rank are not 4 positive numbers"));
  }
}

std::string problems_with(const std::vector<std::string>& overrides) {
  return models::thrown<core::UserError>(
      [&] { load_recipe(std::string(MORAINE_SOURCE_DIR) + "/recipes/flexmore/olmo2-7b.yaml", overrides); });
}

std::string problem_of(const std::string& adapter, const std::string& rank = "auto") {
  return problems_with({"domains.0.train=direct", "domains.0.adapter=" + adapter, "domains.0.rank=\"" + rank + "\""});
}

TEST(DirectExperts, RefuseWhatCannotBeAnExpertByName) {
  EXPECT_THAT(problems_with({"domains.0.adapter={rank: 4}"}), HasSubstr("adapter goes with train: direct"));
  EXPECT_THAT(problem_of("{type: adaptertune}"), HasSubstr("type adaptertune is no change of weights"));
  EXPECT_THAT(problem_of("{type: compacter, target_modules: [o_proj, down_proj], options: {form: adapter}}"),
              HasSubstr("type compacter is no change of weights"));
  EXPECT_THAT(problem_of("{type: bitfit}"), HasSubstr("type bitfit changes biases, and experts have none"));
  for (const std::string targets : {"target_modules: [up_proj]", "target_regex: .*up_proj",
                                    "exclude_modules: [up_proj]", "exclude_regex: .*up_proj"})
    EXPECT_THAT(problem_of("{rank: 4, " + targets + "}"), HasSubstr("leave the targets out")) << targets;
  EXPECT_THAT(problem_of("{rank: 4, rank_pattern: [{module: up_proj, rank: 2}]}"), HasSubstr("one rank"));
  EXPECT_THAT(problem_of("{type: matryoshka, options: {as_trained: true}}"), HasSubstr("as_trained"));
  EXPECT_THAT(problem_of("{rank: 4}", "full"), HasSubstr("rank: full needs a full-size expert, and type lora"));
  EXPECT_THAT(problem_of("{rank: 4}", "5"), HasSubstr("rank 5 is more than the 4"));
  EXPECT_THAT(problem_of("{rank: 4, init: pissa}", "4"), HasSubstr("makes an expert of rank 8"));
  EXPECT_THAT(problem_of("{type: vera, rank: 4}", "3"), HasSubstr("no first ranks to cut it to"));
  EXPECT_THAT(problem_of("{type: dylora, rank: 4, options: {min_rank: 9}}"), HasSubstr("min_rank"));
  EXPECT_EQ(problem_of("{rank: 4, init: pissa}", "8"), "");
  EXPECT_EQ(problem_of("{rank: 4}", "3"), "") << "a plain LoRA may be cut, as a control";
  EXPECT_EQ(problem_of("{type: dora, rank: 4}", "full"), "");
  EXPECT_THAT(problems_with({"domains.0.train=direct", "domains.0.adapter={type: dylora, rank: 4}",
                             "domains.0.rank=auto", "ranks.candidates=[8, 16]"}),
              HasSubstr("rank 4, less than all of ranks.candidates"));
}

TEST(DirectExperts, AreCountedByTheirType) {
  // d 4096, h 11008, 32 layers. Sent: r * 3 (d + h) L, or 3 d h L.
  const std::map<std::string, std::string> notes = {
      {"{rank: 16}", "lora trains 23199744 numbers; as an expert 23199744 are sent (rank 16)"},
      {"{rank: 16, init: pissa}", "lora trains 23199744 numbers; as an expert 46399488 are sent (rank 32)"},
      // 32 (3 * 256 + 2 * 11008 + 4096)
      {"{type: vera, rank: 256}", "vera trains 860160 numbers; as an expert 371195904 are sent (rank 256)"},
      {"{type: lora_xs, rank: 16}", "lora_xs trains 24576 numbers; as an expert 23199744 are sent (rank 16)"},
      // Magnitudes beside A and B: 32 (2 * 11008 + 4096)
      {"{type: dora, rank: 16}", "dora trains 24035328 numbers; as an expert 4328521728 are sent (full-size)"}};
  for (const auto& [adapter, note] : notes) {
    const auto recipe = load_recipe(std::string(MORAINE_SOURCE_DIR) + "/recipes/flexmore/olmo2-7b.yaml",
                                    {"domains.0.train=direct", "domains.0.rank=auto", "domains.0.adapter=" + adapter});
    EXPECT_THAT(recipe.method->parameters().notes, testing::Contains(HasSubstr(note))) << adapter;
  }
}

constexpr const char* kRecipe = R"(
name: tiny
method: flexmore
model: {path: model}
public_path: public.h5
domains:
  - {name: nested, path: right.h5, train: direct, learning_rate: 2e-2, adapter: {type: matryoshka, rank: 4, alpha: 8, dropout: 0.1}}
  - {name: other, path: left.h5, rank: 2}
seq_len: 8
train: {steps: 3, batch_size: 4, learning_rate: 1e-2}
router: {embedding_sequences: 3}
ranks: {candidates: [1, 2, 6], budget: 0.9}
comparisons: [rank_sweep]
evaluation: {sequences: 2, validation_sequences: 2, batch_size: 2}
)";

class DirectRun : public testing::Test {
 protected:
  DirectRun() {
    models::DecoderConfig config = models::tiny_config(models::DecoderConfig::Family::kOlmo2);
    config.vocab_size = 264;
    config.initializer_range = 0.3;
    const auto model = models::Decoder::from_config(config, 5, at::kFloat);
    std::filesystem::create_directory(folder_ / "model");
    write_model_directory(folder_ / "model", config.to_json(), {model.weights().begin(), model.weights().end()});
    for (const char* name : {"public", "right", "left"})
      write_text_file(folder_ / (std::string(name) + ".h5"), name, data::ByteTokenizer::kName, 40);
    recipe_ = folder_.write("recipe.yaml", kRecipe);
  }
  TemporaryDirectory folder_;
  std::filesystem::path recipe_;
};

TEST_F(DirectRun, OneNestedTrainingGivesExpertsOfSeveralRanks) {
  TinyRun run(recipe_, {});
  run.run();
  std::map<std::string, int> kinds;
  std::vector<std::string> of_nested;
  for (const auto& unit : run.finished()) {
    ++kinds[unit.kind];
    if (unit.label.find("nested") != std::string::npos && !unit.label.starts_with("test/base") &&
        !unit.label.starts_with("test/mixture"))
      of_nested.push_back(unit.label);
  }
  EXPECT_EQ(kinds["train_expert"], 2);
  EXPECT_EQ(kinds["extract"], 2) << "of the other alone: at its rank, and for the sweep";
  const core::Json meta = run.made_by("train/nested")->meta();
  EXPECT_EQ(meta.at("rank"), 4);
  EXPECT_EQ(meta.at("scales_by_rank"), (core::Json{4.0, 2.0, 4.0 / 3, 1.0}));
  EXPECT_THAT(of_nested, testing::IsSupersetOf({"validate/nested/r1", "validate/nested/r2"}));
  EXPECT_THAT(of_nested, testing::Contains("test/low_rank_expert/nested")) << "the chosen rank, part of the sweep";
  EXPECT_EQ(std::ranges::count_if(of_nested, [](const auto& label) { return label.starts_with("test/rank/nested/"); }),
            1)
      << "the other rank";
  EXPECT_THAT(of_nested, Not(testing::Contains("validate/nested/r6"))) << "above the rank that was trained";
  const core::Json ranks = run.made_by("merge/mixture")->meta().at("expert_ranks");
  EXPECT_TRUE(ranks[1] == 1 || ranks[1] == 2) << ranks;

  const core::Json summary = run.method().summary(run);
  bool swept = false;
  for (const auto& table : summary.at("tables"))
    if (table.at("title") == "Rank sweep: own expert cut to a rank, bits per byte") {
      swept = true;
      EXPECT_TRUE(table.at("rows")[0].contains("nested") && table.at("rows")[0].contains("other"));
      EXPECT_FALSE(table.at("rows").back().contains("nested")) << "there is no full-size one";
    }
  EXPECT_TRUE(swept);
}

TEST_F(DirectRun, WithoutAnAdapterUnitsAreWhatTheyWere) {
  TinyRun run(recipe_,
              {"domains=[{name: nested, path: " + (folder_ / "right.h5").string() + ", train: direct, rank: 2}]",
               "comparisons=[]"});
  run.run();
  for (const auto& unit : run.finished())
    for (const char* key : {"adapter", "type_version"}) EXPECT_FALSE(unit.spec.contains(key)) << unit.label;
  const core::Json meta = run.made_by("train/nested")->meta();
  for (const char* key : {"adapter", "scales_by_rank"}) EXPECT_FALSE(meta.contains(key));
}

TEST_F(DirectRun, ADenseChangeIsAFullSizeExpertThatIsExtracted) {
  TinyRun run(recipe_, {"domains.0.adapter={type: dora, rank: 2}"});
  run.run();
  EXPECT_EQ(run.made_by("train/nested")->meta().at("rank"), 0);
  EXPECT_EQ(run.made_by("extract/nested")->meta().at("rank"), 6);
  EXPECT_NO_THROW(run.made_by("merge/full"));
}

TEST_F(DirectRun, EveryFormOfTheMixtureHoldsTheExpert) {
  TinyRun run(recipe_, {"domains.0.adapter={type: lora, rank: 3, alpha: 5, init: olora}", "comparisons=[]"});
  run.run();
  EXPECT_EQ(run.made_by("merge/mixture")->meta().at("expert_ranks"), (core::Json{0, 6, 2}));
  for (const char* format : {"hf", "flexolmo", "peft"}) {
    ExportRequest request;
    request.format = format;
    request.directory = folder_ / format;
    run.method().export_as(run, request);
  }
  EXPECT_EQ(read_mixture_directory(folder_ / "hf").mixture.experts.front().rank(), 6);
  const auto base = models::Decoder::from_directory(folder_ / "model", at::kFloat);
  const auto lora = adapters::Adapter::load(folder_ / "peft/nested", base, std::nullopt, at::kCPU);
  const auto expert = read_expert(*run.made_by("train/nested"), 0);
  for (const auto& [name, delta] : lora.deltas(base))
    if (name == ffn_slot(1) + ".down_proj.weight") {
      const models::LowRank& pair = expert.layers[1].down_delta;
      EXPECT_LT(models::relative_error(delta.detach(), at::matmul(pair.b, pair.a)), 1e-5);
    }
}

TEST_F(DirectRun, TheLearningRateOfADomainIsItsOwn) {
  TinyRun run(recipe_, {});
  run.run();
  for (const auto& unit : run.finished())
    if (unit.kind == "train_expert") {
      EXPECT_EQ(unit.spec.at("train").at("learning_rate"), unit.label == "train/nested" ? 2e-2 : 1e-2);
    }
}

TEST_F(DirectRun, AResultOfAnotherRankOrOtherScalesIsNotAccepted) {
  TinyRun run(recipe_, {});
  run.run();
  for (const auto& unit : run.finished()) {
    if (unit.label != "train/nested") continue;
    core::Json meta = run.made_by(unit.label)->meta();
    meta.erase("kind"), meta.erase("scales_by_rank");
    const auto cut = write_expert(read_expert(*run.made_by(unit.label), 2), meta);
    EXPECT_THAT(models::thrown<core::UserError>([&] { run.method().check_result(unit, *cut); }),
                HasSubstr("is of rank 2, planned is 4"));
    Expert other = read_expert(*run.made_by(unit.label), 0);
    other.scales_by_rank[0] = 5;
    const auto stronger = write_expert(other, meta);
    EXPECT_THAT(models::thrown<core::UserError>([&] { run.method().check_result(unit, *stronger); }),
                HasSubstr("other scales of its lower ranks"));
  }
}

TEST_F(DirectRun, AnAdapterThatDoesNotFitThePublicModelIsRefusedBeforeItRuns) {
  const auto refusal = [&](const std::string& adapter) {
    return models::thrown<core::UserError>([&] {
      TinyRun(recipe_, {"comparisons=[]", "domains.0.adapter=" + adapter});
    });
  };
  EXPECT_THAT(refusal("{type: compacter, rank: 8, alpha: 8, options: {n: 5}}"),
              AllOf(HasSubstr("domains.0.adapter"), HasSubstr("does not divide")));
  EXPECT_THAT(refusal("{rank: 500}"), AllOf(HasSubstr("domains.0.adapter"), HasSubstr("rank 500")));
  EXPECT_THAT(refusal("{type: vera, rank: 500}"), HasSubstr("makes an expert of rank 500"));
}

}  // namespace
}  // namespace moraine::algorithms::flexmore
