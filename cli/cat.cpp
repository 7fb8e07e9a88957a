#include <CLI/CLI.hpp>

#include "algorithms/evaluate.h"
#include "cli/command.h"
#include "cli/find_artefact.h"
#include "cli/output.h"
#include "coordinator/report/table.h"
#include "coordinator/run_record.h"
#include "core/error.h"
#include "core/registry.h"
#include "models/tensor_io.h"

namespace moraine::cli {
namespace {

struct CatArguments {
  std::string run, what, tensor, format = "json";
};

core::Json nested(const double*& value, const std::vector<int64_t>& shape, size_t axis) {
  if (axis == shape.size()) return *value++;
  core::Json list = core::Json::array();
  for (int64_t i = 0; i < shape[axis]; ++i) list.push_back(nested(value, shape, axis + 1));
  return list;
}

core::Json values_of(const core::Artefact& artefact, const std::string& name) {
  const core::TensorView* view = artefact.file().find(name);
  if (view == nullptr) {
    std::vector<std::string> names;
    for (const auto& tensor : artefact.file().tensors()) names.push_back(tensor.name);
    throw core::UserError(fmt::format("cli: artefact {} has no tensor '{}'", artefact.id().substr(0, 16), name),
                          core::name_hint(name, names));
  }
  const at::Tensor values = models::copy_of(*view).to(at::kDouble).contiguous();
  const double* first = values.const_data_ptr<double>();
  return nested(first, view->shape, 0);
}

core::Json describe(const coordinator::RunRecord& run, const core::Artefact& artefact) {
  core::Json units = core::Json::array(), tensors = core::Json::array();
  for (const auto& unit : run.units)
    if (unit.artefact == artefact.id()) units.push_back(unit.label);
  for (const auto& tensor : artefact.file().tensors())
    tensors.push_back(
        {{"name", tensor.name}, {"dtype", core::safetensors_name(tensor.dtype)}, {"shape", tensor.shape}});
  core::Json out = {{"id", artefact.id()}, {"units", units}, {"metadata", artefact.meta()}, {"tensors", tensors}};
  if (artefact.kind() == "evaluation" && artefact.meta().contains("result") &&
      artefact.meta().at("result").contains("nats")) {
    const auto result = algorithms::Evaluation::from_json(artefact.meta().at("result"));
    out["scores"] = {
        {"bits_per_byte", result.bits_per_byte()}, {"loss", result.loss()}, {"accuracy", result.accuracy()}};
  }
  return out;
}

void print_rows(const core::Json& facts) {
  core::Json rows = core::Json::array();
  const auto add = [&](const std::string& key, const core::Json& value) {
    rows.push_back({{"key", key}, {"value", value.is_string() ? value : core::Json(value.dump())}});
  };
  add("id", facts.at("id"));
  add("units", facts.at("units"));
  for (const auto& [key, value] : facts.at("metadata").items()) add(key, value);
  const core::Json scores = facts.value("scores", core::Json::object());
  for (const auto& [key, value] : scores.items()) add(key, value);
  for (const auto& tensor : facts.at("tensors"))
    add(tensor.at("name").get<std::string>(), tensor.at("dtype").get<std::string>() + " " + tensor.at("shape").dump());
  print(report::render_table(
      report::plain_table(facts.at("metadata").at("kind").get<std::string>(), {"key", "value"}, rows),
      table_style(160)));
}

void print_artefact(const CatArguments& arguments) {
  const auto run = coordinator::read_run(arguments.run);
  const auto artefact = run.state->artefact(find_artefact(run, arguments.what));
  if (!arguments.tensor.empty()) {
    print(values_of(*artefact, arguments.tensor).dump() + "\n");
    return;
  }
  const core::Json facts = describe(run, *artefact);
  if (arguments.format == "json") {
    print_json(facts);
  } else {
    print_rows(facts);
  }
}

}  // namespace

void add_cat(CLI::App& app, int& exit_code) {
  auto* command = app.add_subcommand("cat", "An artefact of a run as JSON: metadata, tensors, scores of an evaluation");
  auto arguments = std::make_shared<CatArguments>();
  command->add_option("run", arguments->run, "Run directory")->required();
  command->add_option("what", arguments->what, "Unit label, artefact id or its beginning; or mixture")->required();
  command->add_option("--tensor", arguments->tensor, "Print the values of this tensor as nested lists instead");
  add_format_option(*command, arguments->format);
  command->footer(
      "Examples: moraine cat runs/quickstart test/mixture/german\n          moraine cat runs/quickstart train/german "
      "--tensor model.layers.0.mlp.gate.weight");
  command->callback([=, &exit_code] {
    print_artefact(*arguments);
    exit_code = 0;
  });
}

}  // namespace moraine::cli
