#include "algorithms/finetune/finetune.h"

#include <ATen/core/grad_mode.h>

#include "algorithms/adapters/adapter.h"
#include "algorithms/adapters/peft_files.h"
#include "algorithms/evaluate.h"
#include "algorithms/language_model.h"
#include "core/error.h"
#include "core/file.h"
#include "core/hash.h"
#include "core/ordered_json.h"
#include "core/registry.h"
#include "data/model_tokenizer.h"
#include "data/text_dataset.h"
#include "models/checkpoint.h"
#include "models/decoder.h"

namespace moraine::algorithms::finetune {
Finetune::Finetune(FinetuneConfig config)
    : config_(std::move(config)), architecture_(models::DecoderConfig::from_directory(config_.model.path)) {}

Finetune::Finetune(FinetuneConfig config, const core::Json& inputs)
    : config_(std::move(config)),
      architecture_(models::DecoderConfig::from_json(inputs.at("architecture"), "recorded inputs")),
      fingerprints_(inputs.at("fingerprints").get<std::map<std::string, std::string>>()),
      model_id_(inputs.at("model").get<std::string>()) {
  for (const auto& [name, start] : inputs.at("started").items())
    started_[name] = {adapters::adapter_schema().from_json(start.at("adapter")), start.at("hash").get<std::string>()};
}

core::Json Finetune::inputs() const {
  core::Json started = core::Json::object();
  for (const auto& [name, start] : started_)
    started[name] = {{"adapter", adapters::adapter_schema().to_json(start.config)}, {"hash", start.hash}};
  return {{"architecture", architecture_.to_json()},
          {"fingerprints", fingerprints_},
          {"model", model_id_},
          {"started", started}};
}

std::optional<adapters::AdapterConfig> Finetune::adapter_of(const EntryConfig& entry) const {
  return entry.start.empty() ? entry.adapter : started_.at(entry.name).config;
}

std::string Finetune::type_name(const EntryConfig& entry) const {
  const auto adapter = adapter_of(entry);
  if (adapter) return adapter->type;
  return entry.galore ? "galore" : "all weights";
}

void Finetune::open_starts(core::Problems& problems) {
  for (size_t i = 0; i < config_.adapters.size(); ++i) {
    const EntryConfig& entry = config_.adapters[i];
    if (entry.start.empty()) continue;
    const std::string key = fmt::format("adapters.{}.start", i);
    try {
      const std::filesystem::path directory = entry.start;
      const auto config = directory / "adapter_config.json", tensors = directory / "adapter_model.safetensors";
      Started start{adapters::config_from_peft(core::read_ordered_json(config), config.string()),
                    core::sha256(core::read_text(config) + core::sha256(core::read_text(tensors)))};
      const core::Safetensors file = core::open_checked(tensors);
      if (adapters::names_no_target(start.config)) start.config.target_modules = adapters::modules_with_factors(file);
      started_[entry.name] = std::move(start);
    } catch (const core::UserError& error) {
      problems.add(key, key, error.what(), error.hint());
    }
  }
}

void Finetune::check_adapters(core::Problems& problems) const {
  const auto slots = models::decoder_slots(architecture_);
  for (size_t i = 0; i < config_.adapters.size(); ++i) {
    const EntryConfig& entry = config_.adapters[i];
    const std::string key = fmt::format("adapters.{}.{}", i, entry.galore ? "galore" : "adapter");
    try {
      if (entry.galore) (void)galore::targets_of(*entry.galore, slots);
      const auto matching = entry.start.empty() ? adapters::Matching::kEveryName : adapters::Matching::kAnyName;
      if (const auto adapter = adapter_of(entry)) (void)adapters::targets_of(*adapter, slots, matching);
    } catch (const core::UserError& error) {
      problems.add(key, key, error.what(), error.hint());
    }
  }
}

void Finetune::open_inputs() {
  core::Problems problems;
  for (size_t i = 0; i < config_.tasks.size(); ++i) {
    const TaskConfig& task = config_.tasks[i];
    const std::string key = fmt::format("tasks.{}.path", i);
    try {
      for (const std::string& split : {std::string("train"), config_.evaluation.split}) {
        const auto dataset = data::TextDataset::open(task.path, split, config_.seq_len, config_.tokenizer);
        fingerprints_[task.name] = dataset.info().fingerprint;
        data::check_model_tokenizer(dataset.info(), task.path, config_.model.path, architecture_.vocab_size);
      }
    } catch (const core::UserError& error) {
      problems.add(key, key, error.what(), error.hint());
    }
  }
  if (config_.seq_len > architecture_.max_position_embeddings)
    problems.add("seq_len", "seq_len",
                 fmt::format("{} is more than the model's {} positions", config_.seq_len,
                             architecture_.max_position_embeddings));
  open_starts(problems);
  if (problems.empty()) check_adapters(problems);
  if (problems.empty()) model_id_ = model_identity(config_.model.path, architecture_);
  problems.throw_if_any(config_.name);
}

adapters::Counts Finetune::counts(const std::optional<adapters::AdapterConfig>& adapter, bool started) const {
  if (!adapter) return {architecture_.total_parameters(), architecture_.total_parameters()};
  const auto targets = adapters::targets_of(*adapter, models::decoder_slots(architecture_),
                                            started ? adapters::Matching::kAnyName : adapters::Matching::kEveryName);
  return adapters::parametrisation(adapter->type).count(targets, *adapter);
}

ParameterTable Finetune::parameters() const {
  ParameterTable table;
  table.columns = {"adapter", "type", "trained", "% of the model", "stored and sent"};
  for (const auto& entry : config_.adapters) {
    const auto adapter = adapter_of(entry);
    const adapters::Counts numbers = counts(adapter, !entry.start.empty());
    table.rows.push_back(
        {entry.name, type_name(entry), numbers.trained,
         100.0 * static_cast<double>(numbers.trained) / static_cast<double>(architecture_.total_parameters()),
         numbers.stored});
  }
  table.notes = {fmt::format("the model: {} parameters; a number is 4 bytes", architecture_.total_parameters())};
  return table;
}

models::Decoder Finetune::fitted_model(const core::ArtefactPtr& result) const {
  if (result->kind() != "adapter")
    return models::Decoder::from_tensors(architecture_, result->file().tensors(), result->file().origin(), std::nullopt,
                                         result);
  const auto base = models::Decoder::from_directory(config_.model.path, std::nullopt);
  return base.plus(adapters::Adapter::from_artefact(*result, base, at::kCPU).deltas(base));
}

void Finetune::publish(const RunState& state, const std::filesystem::path& run_directory) const {
  PlanBuilder builder(state);
  std::optional<models::Decoder> base;
  for (const Result& result : walk(builder).results) {
    const auto adapter = adapter_of(*result.entry);
    if (!result.artefact || !adapter || !adapters::parametrisation(adapter->type).in_peft(*adapter)) continue;
    if (!base) base = models::Decoder::from_directory(config_.model.path, std::nullopt);
    adapters::Adapter::from_artefact(*state.artefact(*result.artefact), *base, at::kCPU)
        .save(run_directory / "adapters" / result.name(), config_.model.path);
  }
}

const Finetune::Result& Finetune::find_result(const Stages& stages, const std::string& name) const {
  std::vector<std::string> known;
  for (const Result& result : stages.results) {
    if (result.name() == name) {
      if (!result.artefact)
        throw core::UserError(fmt::format("algorithms/finetune: {} is not trained yet", name),
                              "finish the run, then export");
      return result;
    }
    known.push_back(result.name());
  }
  if (name.empty() && stages.results.size() == 1) return find_result(stages, known.front());
  throw core::UserError(
      name.empty() ? fmt::format("algorithms/finetune: the run has {} results", known.size())
                   : fmt::format("algorithms/finetune: the run has no result '{}'", name),
      "name one with --what: " + (name.empty() ? fmt::format("{}, ...", known.front()) : core::name_hint(name, known)));
}

void Finetune::export_as(const RunState& state, const ExportRequest& request) const {
  const at::NoGradGuard no_grad;
  PlanBuilder builder(state);
  const Stages stages = walk(builder);
  const Result& result = find_result(stages, request.what);
  const core::ArtefactPtr artefact = state.artefact(*result.artefact);
  if (request.format == "peft") {
    if (!adapter_of(*result.entry))
      throw core::UserError(fmt::format("algorithms/finetune: {} trained all weights: it is no adapter", result.name()),
                            "--to hf writes the model");
    const auto base = models::Decoder::from_directory(config_.model.path, std::nullopt);
    return adapters::Adapter::from_artefact(*artefact, base, at::kCPU)
        .save(request.directory, request.base_model.empty() ? config_.model.path : request.base_model);
  }
  if (request.format != "hf")
    throw core::UserError(fmt::format("algorithms/finetune: a result has no form '{}'", request.format),
                          "--to peft: the adapter; --to hf: the merged model");
  const models::Decoder merged = fitted_model(artefact);
  write_model_directory(request.directory, architecture_.to_json(), {merged.weights().begin(), merged.weights().end()});
  models::copy_companions(config_.model.path, request.directory);
}

MethodEntry method_entry() {
  return {"finetune",
          "fits one model to tasks: every adapter (or all weights) with every task and seed, in one table",
          [](const core::ConfigNode& root, core::Problems& problems) {
            FinetuneConfig config;
            finetune_schema().parse(root, "", config, problems);
            ParsedRecipe recipe;
            recipe.run = config;
            finetune_schema().resolve(root, "", config, recipe.resolved);
            recipe.values = finetune_schema().to_json(config);
            if (problems.empty()) recipe.method = std::make_unique<Finetune>(std::move(config));
            return recipe;
          },
          [](const core::Json& values, const core::Json& inputs) -> std::unique_ptr<Method> {
            return std::make_unique<Finetune>(finetune_schema().from_json(values), inputs);
          },
          [](const core::Json& values) { return finetune_schema().identity(values); },
          [] { return finetune_schema().json_schema(); },
          [] { return finetune_schema().markdown(); }};
}

}  // namespace moraine::algorithms::finetune
