#include <algorithm>

#include <CLI/CLI.hpp>

#include "algorithms/adapters/peft_files.h"
#include "algorithms/flexmore/mixture_files.h"
#include "cli/command.h"
#include "cli/find_artefact.h"
#include "cli/output.h"
#include "cli/run_summary.h"
#include "core/error.h"

namespace moraine::cli {
namespace {

namespace fs = std::filesystem;

struct ExportArguments {
  std::string source;
  algorithms::ExportRequest request;
};

// An artefact on its own: a LoRA, or one low-rank expert of a mixture.
void export_artefact(const core::ArtefactPtr& artefact, const ExportArguments& arguments) {
  if (arguments.request.format != "peft")
    throw core::UserError(fmt::format("cli: {} is one artefact of kind '{}'; alone it can only be exported as peft",
                                      artefact->file().origin(), artefact->kind()),
                          "--to hf, flexolmo and olmo_core need a run or a mixture directory");
  if (artefact->kind() == "expert") {
    algorithms::flexmore::write_peft_expert(algorithms::flexmore::read_expert(*artefact, 0),
                                            arguments.request.directory, arguments.request.base_model);
  } else {
    algorithms::adapters::export_adapter(*artefact, arguments.request.directory, arguments.request.base_model);
  }
}

void export_source(ExportArguments arguments) {
  const fs::path source = arguments.source, out = arguments.request.directory;
  if (arguments.request.base_model.empty() && fs::exists(source / "public_model"))
    arguments.request.base_model = fs::absolute(source / "public_model").lexically_normal();
  if (fs::exists(out) && !(fs::is_directory(out) && fs::is_empty(out)))
    throw core::UserError(fmt::format("cli: {} exists and is not empty", out.string()), "name a new directory");
  if (fs::exists(source / "recipe.json")) {
    const auto run = coordinator::read_run(source);
    const auto& what = arguments.request.what;
    if (std::any_of(run.units.begin(), run.units.end(), [&](const auto& unit) { return unit.label == what; })) {
      export_artefact(run.state->artefact(find_artefact(run, what)), arguments);
    } else {
      from_stored(run, [&]() -> core::Json {
        restore_method(run)->export_as(*run.state, arguments.request);
        return {};
      });
    }
  } else if (fs::exists(source / "config.json")) {
    algorithms::flexmore::export_mixture(algorithms::flexmore::read_mixture_directory(source), arguments.request);
  } else if (fs::is_regular_file(source)) {
    export_artefact(core::Artefact::parse(core::Bytes::map_file(source), "", source.string()), arguments);
  } else {
    throw core::UserError(fmt::format("cli: {} is no run, mixture directory or artefact", source.string()),
                          "name a directory with recipe.json or config.json, or a file that `moraine cp` made");
  }
  std::vector<fs::path> files;
  for (const auto& entry : fs::recursive_directory_iterator(out))
    if (entry.is_regular_file()) files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  std::string listing;
  for (const auto& file : files) listing += fmt::format("{:12}  {}\n", fs::file_size(file), file.string());
  print(listing);
}

}  // namespace

void add_export(CLI::App& app, int& exit_code) {
  auto* command = app.add_subcommand(
      "export", "Writes a result in a format of other tools: PEFT, FlexOlmo of transformers, FlexMoRE keys");
  auto arguments = std::make_shared<ExportArguments>();
  auto directory = std::make_shared<std::string>();
  command
      ->add_option("source", arguments->source, "Run, mixture directory, or artefact file (adapter, low-rank expert)")
      ->required();
  command->add_option("out", *directory, "New directory")->required();
  command
      ->add_option("--to", arguments->request.format,
                   "peft: LoRA adapters | flexolmo: for transformers, low rank made dense | olmo_core: the same in "
                   "OLMo-core's keys | hf: FlexMoRE keys, experts as they are")
      ->required()
      ->check(CLI::IsMember({"peft", "hf", "flexolmo", "olmo_core"}));
  command->add_option("--what", arguments->request.what,
                      "Which result of a run (flexmore: mixture, full_mixture), or a unit's label");
  command->add_option("--experts", arguments->request.experts, "Only these experts of a mixture, separated by commas")
      ->delimiter(',');
  command
      ->add_option("--dtype", arguments->request.dtype,
                   "flexolmo, olmo_core: round to this type (default: the widest stored, which loses nothing)")
      ->check(CLI::IsMember({"float32", "bfloat16"}));
  command->add_option("--base-model", arguments->request.base_model,
                      "peft: base_model_name_or_path (default: the run's model, as far as it is known)");
  command->footer(
      "Examples: moraine export runs/quickstart german-lora --to peft --experts german\n          moraine export "
      "runs/quickstart flexolmo --to flexolmo --what full_mixture");
  command->callback([=, &exit_code] {
    arguments->request.directory = *directory;
    export_source(*arguments);
    exit_code = 0;
  });
}

}  // namespace moraine::cli
