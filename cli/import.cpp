#include <ATen/core/grad_mode.h>
#include <CLI/CLI.hpp>

#include "algorithms/adapters/adapter.h"
#include "algorithms/adapters/peft_files.h"
#include "algorithms/flexmore/mixture_files.h"
#include "algorithms/language_model.h"
#include "cli/command.h"
#include "cli/output.h"
#include "core/error.h"
#include "core/file.h"
#include "models/checkpoint.h"
#include "models/tensor_io.h"

namespace moraine::cli {
namespace {

namespace fs = std::filesystem;
namespace flexmore = algorithms::flexmore;

struct ImportArguments {
  std::string directory, out, base, dtype = "float32";
};

void store(const core::Artefact& artefact, const fs::path& path) {
  core::write_atomically(path, artefact.bytes().span());
  print(fmt::format("{}  {}\n", artefact.id(), path.string()));
}

void import_peft(const ImportArguments& arguments) {
  if (!arguments.base.empty()) {  // with the model at hand, shapes and names of its modules are checked as well
    const auto model = models::Decoder::from_directory(arguments.base, std::nullopt);
    algorithms::adapters::Adapter::load(arguments.directory, model, std::nullopt, at::kCPU);
  }
  store(*algorithms::adapters::import_adapter(arguments.directory), arguments.out);
}

void import_dense(const ImportArguments& arguments, const models::DecoderConfig& config) {
  const auto model = models::Decoder::from_directory(arguments.directory, std::nullopt);
  const models::NamedTensors weights(model.weights().begin(), model.weights().end());
  std::vector<at::Tensor> keep;
  store(*core::Artefact::create("base", {{"config", config.to_json()}}, models::views_of(weights, keep)),
        arguments.out);
}

// Public model, one artefact per expert, and the mixture: what `moraine merge` joins again.
void import_mixture(const ImportArguments& arguments) {
  const flexmore::MixtureModel model = flexmore::read_mixture_directory(arguments.directory);
  const fs::path out = arguments.out;
  for (const auto& expert : model.mixture.experts)
    if (expert.name == "mixture" || expert.name == "public_model")
      throw core::UserError(fmt::format("cli: {}: an expert is named '{}', as a part of what import writes",
                                        arguments.directory, expert.name),
                            "rename it in config.json's '_expert_names'");
  algorithms::write_model_directory(out / "public_model", model.base.to_json(),
                                    {model.base_weights.begin(), model.base_weights.end()});
  models::copy_companions(arguments.directory, out / "public_model");
  print(fmt::format("public model  {}\n", (out / "public_model").string()));
  const std::string base = algorithms::model_identity(out / "public_model", model.base.to_json());
  std::map<std::string, at::Tensor> weights;  // as a worker sees them
  for (const auto& [name, weight] : model.base_weights)
    weights.emplace(name, weight.to(arguments.dtype == "bfloat16" ? at::kBFloat16 : at::kFloat));
  const core::Json fingerprint = flexmore::fingerprint_of_base(weights, model.mixture.public_rows);
  for (const auto& expert : model.mixture.experts)
    store(*flexmore::write_expert(expert, {{"base", base}, {"base_tensors", fingerprint}}),
          out / (expert.name + ".safetensors"));
  store(*flexmore::write_mixture(model.mixture, {{"base", base}}), out / "mixture.safetensors");
}

void import_source(const ImportArguments& arguments) {
  const at::NoGradGuard no_grad;
  const fs::path directory = arguments.directory, out = arguments.out;
  if (fs::exists(out) && !(fs::is_directory(out) && fs::is_empty(out)))
    throw core::UserError(fmt::format("cli: {} exists", out.string()), "name a new file or directory");
  if (fs::exists(directory / "adapter_config.json")) return import_peft(arguments);
  const fs::path file = directory / "config.json";
  const auto config = models::DecoderConfig::from_json(core::read_json(file), file.string());
  config.is_mixture() ? import_mixture(arguments) : import_dense(arguments, config);
}

}  // namespace

void add_import(CLI::App& app, int& exit_code) {
  auto* command = app.add_subcommand(
      "import", "Reads what other tools wrote: PEFT adapters, FlexOlmo and FlexMoRE mixtures, dense models");
  auto arguments = std::make_shared<ImportArguments>();
  command
      ->add_option("directory", arguments->directory,
                   "PEFT or Hugging Face directory; FlexOlmo with one tensor per expert, packed, or in OLMo-core's "
                   "keys beside a config.json of Hugging Face")
      ->required();
  command
      ->add_option("out", arguments->out,
                   "Artefact file; of a mixture: a directory for public model, experts and mixture")
      ->required();
  command->add_option("--base", arguments->base, "PEFT: the adapter's base model, to check names and shapes against");
  command
      ->add_option("--dtype", arguments->dtype,
                   "Mixture: type that runs compute in, whose bytes of the public model a merge compares")
      ->check(CLI::IsMember({"float32", "bfloat16"}))
      ->capture_default_str();
  command->footer(
      "Examples: moraine import adapters/german german.safetensors --base models/olmo2\n          moraine import "
      "FlexOlmo-7x7B-1T imported");
  command->callback([=, &exit_code] {
    import_source(*arguments);
    exit_code = 0;
  });
}

}  // namespace moraine::cli
