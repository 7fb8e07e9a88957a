// Every parametrisation under every procedure that fits a model's slots to data, on every kind of backbone the
// procedure takes: two steps train, change the loss, export, and give the same bits again; or a message says why they
// cannot. A type that is registered is in this table.
#include <cmath>
#include <map>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "algorithms/adapters/parametrisation.h"
#include "algorithms/language_model.h"
#include "core/error.h"
#include "core/hash.h"
#include "data/byte_tokenizer.h"
#include "models/bert.h"
#include "models/vit.h"
#include "tests/algorithms/tiny_run.h"
#include "tests/models/random_tensors.h"
#include "tests/temporary_directory.h"

namespace moraine::algorithms {
namespace {

using adapters::Change;
using adapters::Parametrisation;
using testing::AllOf;
using testing::HasSubstr;

/// A procedure on a backbone: a recipe with ADAPTER for the adapter as a map, and what its results are exported as.
struct Procedure {
  const char* name;
  const char* recipe;
  std::vector<std::string> formats;
};

const std::vector<Procedure>& procedures() {
  static const std::vector<Procedure> all = {
      {"finetune_decoder",
       R"(
name: table
method: finetune
model: {path: decoder}
tasks: [{name: one, path: left.h5}]
seq_len: 8
adapters: [{name: it, adapter: ADAPTER}]
train: {steps: 2, batch_size: 4, learning_rate: 1e-2}
evaluation: {sequences: 2}
)",
       {"peft", "hf"}},
      {"finetune_bert",
       R"(
name: table
method: finetune
model: {path: bert}
tasks: [{name: one, path: classes.h5}]
seq_len: 8
adapters: [{name: it, adapter: ADAPTER}]
train: {steps: 2, batch_size: 4, learning_rate: 1e-2}
evaluation: {sequences: 4}
)",
       {"peft", "hf"}},
      {"finetune_vit",
       R"(
name: table
method: finetune
model: {path: vit}
tasks: [{name: one, path: images.h5}]
adapters: [{name: it, adapter: ADAPTER}]
train: {steps: 2, batch_size: 4, learning_rate: 1e-2}
evaluation: {sequences: 4}
)",
       {"peft", "hf"}},
      {"flexmore_decoder",
       R"(
name: table
method: flexmore
model: {path: decoder}
public_path: public.h5
domains: [{name: it, path: left.h5, train: direct, adapter: ADAPTER}]
seq_len: 8
train: {steps: 2, batch_size: 4, learning_rate: 1e-2}
router: {embedding_sequences: 2}
ranks: {candidates: [1, 2], budget: 0.9}
evaluation: {sequences: 2, validation_sequences: 2}
)",
       {"hf", "flexolmo"}},
      {"seq_lora_vit",
       R"(
name: table
method: continual
model: {path: vit}
images: {path: images.h5}
stream: {increment: 2}
train: {steps: 2, batch_size: 4, learning_rate: 1e-2}
methods: [seq_lora]
learners: {seq_lora: {adapter: ADAPTER}}
)",
       {}},
  };
  return all;
}

struct Case {
  const Parametrisation* type;
  const Procedure* procedure;
};
void PrintTo(const Case& c, std::ostream* out) { *out << c.type->name() << " by " << c.procedure->name; }

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const Procedure& procedure : procedures())
    for (const Parametrisation* type : adapters::parametrisations()) all.push_back({type, &procedure});
  return all;
}

adapters::AdapterConfig plain(const Parametrisation& type) {
  adapters::AdapterConfig config;
  config.type = type.name();
  return config;
}

/// Why a procedure refuses a type, out of what the type says of itself; "" where it must not.
std::string reason(const Parametrisation& type, const std::string& procedure) {
  const Change change = type.change(plain(type));
  if (procedure.starts_with("flexmore")) {
    if (change == Change::kNone) return "is no change of weights";
    if (change == Change::kBias) return "changes biases, and experts have none";
  }
  if (procedure.starts_with("seq_lora") && type.wants(plain(type)) != adapters::Wants::kNothing)
    return "starts from examples";
  return "";
}

class AdapterTable : public testing::TestWithParam<Case> {
 protected:
  static void SetUpTestSuite() {
    files_ = std::make_unique<TemporaryDirectory>();
    models::DecoderConfig decoder = models::tiny_config(models::DecoderConfig::Family::kOlmo2);
    decoder.vocab_size = 264;
    write_model("decoder", decoder.to_json(), models::Decoder::from_config(decoder, 5, at::kFloat));
    models::BertConfig bert;
    bert.vocab_size = 264, bert.hidden_size = 8, bert.intermediate_size = 16, bert.num_layers = 2;
    bert.num_heads = 2, bert.max_position_embeddings = 16;
    write_model("bert", bert.to_json(), models::Bert::from_config(bert, 5, at::kFloat));
    models::VitConfig vit;
    vit.image_size = 4, vit.patch_size = 2, vit.num_channels = 1, vit.hidden_size = 8, vit.intermediate_size = 12;
    vit.num_layers = 2, vit.num_heads = 2;
    write_model("vit", vit.to_json(), models::Vit::from_config(vit, 5, at::kFloat));
    for (const char* name : {"public", "left"})
      write_text_file(*files_ / (std::string(name) + ".h5"), name, data::ByteTokenizer::kName, 60);
    write_classification_file(*files_ / "classes.h5", 12);
    write_image_file(*files_ / "images.h5", 4, 97);
  }
  static void TearDownTestSuite() { files_.reset(); }

  static void write_model(const char* name, const core::Json& config, const models::Backbone& model) {
    std::filesystem::create_directory(*files_ / name);
    write_model_directory(*files_ / name, config, {model.weights().begin(), model.weights().end()});
  }

  /// A recipe with a small configuration of the type.
  static std::filesystem::path recipe(const Procedure& procedure, const Parametrisation& type) {
    std::string text = procedure.recipe;
    text.replace(text.find("ADAPTER"), std::string("ADAPTER").size(),
                 fmt::format("{{type: {}{}}}", type.name(), type.traits().uses_rank ? ", rank: 2" : ""));
    return files_->write("recipe.yaml", text);
  }

  static std::unique_ptr<TemporaryDirectory> files_;
};
std::unique_ptr<TemporaryDirectory> AdapterTable::files_;

/// Tensors of what was trained, without heads, by name; expects losses that are numbers.
std::map<std::string, std::string> trained_tensors(const TinyRun& run) {
  std::map<std::string, std::string> digests;
  for (const auto& unit : run.finished()) {
    const auto artefact = run.artefact(run.result(unit.id()).value());
    if (!artefact->meta().contains("curve") || artefact->meta().at("curve").empty()) continue;
    EXPECT_TRUE(std::isfinite(artefact->meta().at("curve").back().at(1).get<double>())) << unit.label;
    for (const auto& tensor : artefact->file().tensors())
      if (!tensor.name.starts_with("head.")) digests[unit.label + "/" + tensor.name] = core::sha256(tensor.data);
  }
  EXPECT_FALSE(digests.empty());
  return digests;
}

/// Why a result of the type has no such form, out of what the type says of itself; "" where it has it. Of the backbones
/// the decoder has no biases.
std::string no_form(const Parametrisation& type, const std::string& procedure, const std::string& format) {
  const Change change = type.change(plain(type));
  const bool known = format == "peft" ? !type.peft_type().empty() : change != Change::kNone;
  if (!known) return "type " + type.name();
  const bool no_biases = procedure.ends_with("decoder");
  return format != "peft" && change == Change::kBias && no_biases ? "changes the bias of" : "";
}

TEST_P(AdapterTable, TrainsAndExportsTheSameBitsTwiceOrIsRefusedWithTheReason) {
  const auto& [type, procedure] = GetParam();
  const auto path = recipe(*procedure, *type);
  const std::string why = reason(*type, procedure->name);
  if (!why.empty()) {
    const std::string message = models::thrown<core::UserError>([&] { TinyRun(path, {}).run(); });
    EXPECT_THAT(message, AllOf(HasSubstr("type " + type->name()), HasSubstr(why)));
    return;
  }
  TinyRun run(path, {}), again(path, {}), shorter(path, {"train.steps=1"});
  run.run(), again.run(), shorter.run();
  EXPECT_EQ(run.made(), again.made());
  EXPECT_NE(trained_tensors(run), trained_tensors(shorter)) << "the second step changes nothing";
  for (const auto& format : procedure->formats) {
    ExportRequest request;
    request.format = format;
    request.directory = *files_ / fmt::format("{}_{}_{}", type->name(), procedure->name, format);
    const std::string message = models::thrown<core::UserError>([&] { run.method().export_as(run, request); });
    const std::string expected = no_form(*type, procedure->name, format);
    EXPECT_EQ(message.empty(), expected.empty()) << format << ": " << message;
    EXPECT_THAT(message, HasSubstr(expected)) << format;
  }
}

std::string name_of(const testing::TestParamInfo<Case>& info) {
  return info.param.type->name() + "_by_" + info.param.procedure->name;
}
INSTANTIATE_TEST_SUITE_P(Adapters, AdapterTable, testing::ValuesIn(cases()), name_of);

}  // namespace
}  // namespace moraine::algorithms
