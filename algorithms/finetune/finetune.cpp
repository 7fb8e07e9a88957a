#include "algorithms/finetune/finetune.h"

#include <algorithm>

#include <ATen/core/grad_mode.h>

#include "algorithms/adapters/adapter.h"
#include "algorithms/classifier_files.h"
#include "algorithms/language_model.h"
#include "core/error.h"
#include "core/registry.h"

namespace moraine::algorithms::finetune {

Finetune::Finetune(FinetuneConfig config) : config_(std::move(config)) {}

Finetune::Finetune(FinetuneConfig config, const core::Json& inputs)
    : config_(std::move(config)),
      facts_(models::ModelFacts::from_json(inputs.at("model_facts"))),
      model_id_(inputs.at("model").get<std::string>()) {
  for (const auto& [name, facts] : inputs.at("tasks").items()) tasks_[name] = objectives::TaskFacts::from_json(facts);
  for (const auto& [name, start] : inputs.at("started").items())
    started_[name] = {adapters::adapter_schema().from_json(start.at("adapter")), start.at("hash").get<std::string>(),
                      start.value("classes", int64_t{0})};
}

core::Json Finetune::inputs() const {
  core::Json started = core::Json::object(), tasks = core::Json::object();
  for (const auto& [name, start] : started_) {
    started[name] = {{"adapter", adapters::adapter_schema().to_json(start.config)}, {"hash", start.hash}};
    if (start.classes > 0) started[name]["classes"] = start.classes;
  }
  for (const auto& [name, facts] : tasks_) tasks[name] = facts.to_json();
  return {{"model_facts", facts_->to_json()}, {"tasks", tasks}, {"model", model_id_}, {"started", started}};
}

std::optional<adapters::AdapterConfig> Finetune::adapter_of(const EntryConfig& entry) const {
  return entry.start.empty() ? entry.adapter : started_.at(entry.name).config;
}

void Finetune::open_starts(core::Problems& problems) {
  for (size_t i = 0; i < config_.adapters.size(); ++i) {
    const EntryConfig& entry = config_.adapters[i];
    if (entry.start.empty()) continue;
    const std::string key = fmt::format("adapters.{}.start", i);
    try {
      const auto read = adapters::read_peft_directory(entry.start, &facts_->classifier);
      started_[entry.name] = {read.config, read.hash(), objectives::Head::classes_of(read.classifier, *facts_)};
    } catch (const core::UserError& error) {
      problems.add(key, key, error.what(), error.hint());
    }
  }
}

void Finetune::check_adapters(core::Problems& problems) const {
  for (size_t i = 0; i < config_.adapters.size(); ++i) {
    const EntryConfig& entry = config_.adapters[i];
    const std::string key = fmt::format("adapters.{}.{}", i, entry.galore ? "galore" : "adapter");
    try {
      if (entry.galore) (void)galore::targets_of(*entry.galore, facts_->slots);
      const auto matching = entry.start.empty() ? adapters::Matching::kEveryName : adapters::Matching::kAnyName;
      if (const auto adapter = adapter_of(entry)) {
        (void)adapters::targets_of(*adapter, facts_->slots, matching);
        // A layer that runs again takes gradients by the parameters of its slots (models/recompute.h).
        if (config_.gradient_checkpointing && adapters::parametrisation(adapter->type).traits().trains_shared)
          throw core::UserError(
              fmt::format(
                  "algorithms/finetune: type {} trains a tensor that all slots share, and gradient_checkpointing "
                  "would lose its gradient",
                  adapter->type),
              "leave gradient_checkpointing out");
      }
      for (const auto& [task, facts] : tasks_) check_head(entry, task, facts.classes);
    } catch (const core::UserError& error) {
      problems.add(key, key, error.what(), error.hint());
    }
  }
}

void Finetune::check_head(const EntryConfig& entry, const std::string& task, int64_t classes) const {
  if (entry.head_only && classes == 0)
    throw core::UserError(fmt::format("algorithms/finetune: task '{}' has no head to train", task),
                          "next tokens are predicted by the model itself: leave the entry out");
  const int64_t started = entry.start.empty() ? 0 : started_.at(entry.name).classes;
  if (started > 0 && started != classes)
    throw core::UserError(fmt::format("algorithms/finetune: {} has a head for {} classes, task '{}' has {}",
                                      entry.start, started, task, classes),
                          "start from an adapter of the same classes, or take modules_to_save and its tensors out");
}

void Finetune::open_model() { facts_ = models::model_facts(config_.model.path, config_.model.size()); }

void Finetune::open_tasks(core::Problems& problems) {
  for (size_t i = 0; i < config_.tasks.size(); ++i) {
    const TaskConfig& task = config_.tasks[i];
    const std::string key = fmt::format("tasks.{}.path", i);
    try {
      tasks_[task.name] = objectives::inspect(task.path, config_.evaluation.split, options_of(task), *facts_, place());
    } catch (const core::UserError& error) {
      problems.add(key, key, error.what(), error.hint());
      continue;
    }
    if (config_.early_stopping) open_validation(task, problems);
  }
}

void Finetune::open_validation(const TaskConfig& task, core::Problems& problems) {
  objectives::TaskFacts& facts = tasks_.at(task.name);
  try {
    facts.validation = config_.evaluation.split == "validation"
                           ? facts.evaluated
                           : objectives::inspect(task.path, "validation", options_of(task), *facts_, place()).evaluated;
  } catch (const core::UserError& error) {
    problems.add("early_stopping", "early_stopping",
                 fmt::format("task '{}' has no validation data to score: {}", task.name, error.what()), error.hint());
  }
}

objectives::ModelPlace Finetune::place() const { return {config_.model.path, config_.model.image_size > 0}; }

void Finetune::open_inputs() {
  open_model();
  core::Problems problems;
  open_tasks(problems);
  open_starts(problems);
  if (problems.empty()) check_adapters(problems);
  if (problems.empty()) model_id_ = model_identity(config_.model.path, facts_->config);
  problems.throw_if_any(config_.name);
}

adapters::Counts Finetune::counts(const std::optional<adapters::AdapterConfig>& adapter, bool started) const {
  if (!adapter) return {facts_->parameters, facts_->parameters};
  const auto targets = adapters::targets_of(*adapter, facts_->slots,
                                            started ? adapters::Matching::kAnyName : adapters::Matching::kEveryName);
  return adapters::parametrisation(adapter->type).count(targets, *adapter);
}

adapters::Counts Finetune::counts(const EntryConfig& entry) const {
  return entry.head_only ? adapters::Counts{} : counts(adapter_of(entry), !entry.start.empty());
}

std::string Finetune::type_of(const EntryConfig& entry) const {
  const auto adapter = adapter_of(entry);
  return adapter ? adapter->type : entry.head_only ? "head alone" : entry.galore ? "galore" : "all weights";
}

ParameterTable Finetune::parameters() const {
  if (!facts_) {  // counting needs the model's shapes, and adapters to start from, but no data
    Finetune opened(config_);
    core::Problems problems;
    opened.open_model();
    opened.open_starts(problems);
    problems.throw_if_any(config_.name);
    return opened.parameters();
  }
  ParameterTable table;
  table.columns = {"adapter", "type", "trained", "% of the model", "stored and sent"};
  const auto all = static_cast<double>(facts_->parameters);
  for (const auto& entry : config_.adapters) {
    const adapters::Counts numbers = counts(entry);
    table.rows.push_back({entry.name, type_of(entry), numbers.trained,
                          100.0 * static_cast<double>(numbers.trained) / all, numbers.stored});
  }
  table.notes = {fmt::format("the model: {} parameters; a number is 4 bytes", facts_->parameters)};
  const int64_t row = objectives::Head::count(1, *facts_);
  table.notes.push_back(fmt::format("a task with classes trains a head beside: {} numbers per class", row));
  return table;
}

void Finetune::publish(const RunState& state, const std::filesystem::path& run_directory) const {
  PlanBuilder builder(state);
  for (const Result& result : walk(builder).results) {
    const auto adapter = adapter_of(*result.entry);
    if (!result.artefact || !adapter || !adapters::parametrisation(adapter->type).in_peft(*adapter)) continue;
    if (tasks_.at(result.task->name).classes > 0 && facts_->classifier.architecture.empty()) continue;
    export_peft(result, *state.artefact(*result.artefact), run_directory / "adapters" / result.name(),
                config_.model.path);
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

void Finetune::export_peft(const Result& result, const core::Artefact& artefact, const std::filesystem::path& directory,
                           const std::string& base_model) const {
  const auto base = models::open_backbone(config_.model.path, std::nullopt, config_.model.size());
  const auto head = objectives::Head::read(artefact, at::kCPU);
  adapters::Adapter::from_artefact(artefact, *base, at::kCPU)
      .save(directory, base_model, peft_classifier({*facts_, head, {}, "finetune: " + result.name()}));
}

void Finetune::export_model(const std::string& result, const core::ArtefactPtr& artefact,
                            const std::filesystem::path& directory) const {
  const auto base = models::open_backbone(config_.model.path, std::nullopt, config_.model.size());
  auto merged = fitted(*base, artefact);
  if (artefact->kind() == kAdapter)
    merged = base->changed_by(adapters::Adapter::from_artefact(*artefact, *base, at::kCPU).deltas(*base));
  const auto head = objectives::Head::read(*artefact, at::kCPU);
  write_fitted_model(*merged, {*facts_, head, {}, "finetune: " + result}, config_.model.path, directory);
}

void Finetune::export_as(const RunState& state, const ExportRequest& request) const {
  const at::NoGradGuard no_grad;
  PlanBuilder builder(state);
  const Stages stages = walk(builder);
  const Result& result = find_result(stages, request.what);
  const core::ArtefactPtr artefact = state.artefact(*result.artefact);
  if (request.format == "peft") {
    if (!adapter_of(*result.entry))
      throw core::UserError(fmt::format("algorithms/finetune: {} is no adapter", result.name()),
                            "--to hf writes the model");
    return export_peft(result, *artefact, request.directory,
                       request.base_model.empty() ? config_.model.path : request.base_model);
  }
  if (request.format != "hf")
    throw core::UserError(fmt::format("algorithms/finetune: a result has no form '{}'", request.format),
                          "--to peft: the adapter; --to hf: the merged model");
  export_model(result.name(), artefact, request.directory);
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
