// What a run wants done: a fan-out over adapters, tasks and seeds, each result followed by its evaluations.
#include <algorithm>
#include <iterator>

#include "algorithms/adapters/adapter.h"
#include "algorithms/finetune/finetune.h"
#include "core/error.h"
#include "core/hash.h"

namespace moraine::algorithms::finetune {

std::string Finetune::Result::name() const { return fmt::format("{}/{}/seed{}", entry->name, task->name, seed); }

objectives::TaskOptions Finetune::options_of(const TaskConfig& task) const {
  return {.seq_len = config_.seq_len,
          .tokenizer = config_.tokenizer,
          .packing = task.packing,
          .label_smoothing = config_.label_smoothing,
          .mean = task.mean,
          .deviation = task.deviation,
          .validation_share = task.validation_share};
}

objectives::DataSpec Finetune::data_spec(const TaskConfig& task, const std::string& split) const {
  const objectives::TaskFacts& facts = tasks_.at(task.name);
  return {.name = task.name,
          .objective = facts.objective,
          .fingerprint = facts.fingerprint,
          .split = split,
          .classes = facts.classes,
          .options = objectives::relevant(options_of(task), facts.objective, split)};
}

double Finetune::cost_of(const TaskConfig& task, int64_t rows) const {
  return 2 * static_cast<double>(facts_->parameters) * static_cast<double>(rows * tasks_.at(task.name).tokens_per_row);
}

// Of all evaluations there may be.
double Finetune::validation_cost(const TaskConfig& task) const {
  if (!config_.early_stopping) return 0;
  const EarlyStoppingConfig& stopping = *config_.early_stopping;
  const int64_t all = tasks_.at(task.name).validation, rows = stopping.sequences;
  const int64_t evaluations = (config_.train.steps + stopping.every - 1) / stopping.every;
  return cost_of(task, evaluations * (rows ? std::min(rows, all) : all));
}

Unit Finetune::train_unit(const Result& result) const {
  const auto seed = static_cast<uint64_t>(result.seed);
  TrainConfig train = config_.train;
  if (result.entry->learning_rate) train.learning_rate = *result.entry->learning_rate;
  if (result.entry->optimizer) train.optimizer = *result.entry->optimizer;
  const auto adapter = adapter_of(*result.entry);
  const TrainSpec spec{
      .type_version = adapter ? adapters::parametrisation(adapter->type).result_version() : 1,
      .compute = compute_identity(config_.workers),
      .base = model_id_,
      .adapter = adapter,
      .galore = result.entry->galore,
      .start = result.entry->start.empty() ? "" : started_.at(result.entry->name).hash,
      .head_only = result.entry->head_only,
      .data = data_spec(*result.task, "train"),
      .early_stopping = config_.early_stopping,
      .validation = config_.early_stopping ? std::optional(data_spec(*result.task, "validation")) : std::nullopt,
      .adapter_seed = core::derive_seed(seed, "finetune/adapter"),
      .data_seed = core::derive_seed(seed, "finetune/data/" + result.task->name),
      .train = train_identity(train)};
  // Times a forward pass: frozen weights take no gradients, and below a head alone nothing does.
  const double passes = result.entry->head_only ? 1 : adapter ? 2 : 3;
  Unit unit{TrainSpec::kKind,
            "train/" + result.name(),
            core::to_spec(TrainSpec::schema(), spec),
            {},
            Place::kWorker,
            passes * cost_of(*result.task, train.steps * train.batch_size) + validation_cost(*result.task)};
  unit.follows = evaluation_unit("", *result.task, {}).cost;
  return unit;
}

Unit Finetune::evaluation_unit(const std::string& label, const TaskConfig& task, std::vector<std::string> inputs,
                               int64_t rank) const {
  const int64_t rows = config_.evaluation.sequences, all = tasks_.at(task.name).evaluated;
  const EvaluateSpec spec{.compute = compute_identity(config_.workers),
                          .base = model_id_,
                          .dtype = config_.train.dtype,
                          .data = data_spec(task, config_.evaluation.split),
                          .sequences = rows,
                          .batch_size = config_.evaluation.batch_size,
                          .rank = rank};
  return {EvaluateSpec::kKind, label,          core::to_spec(EvaluateSpec::schema(), spec),
          std::move(inputs),   Place::kWorker, cost_of(task, rows ? std::min(rows, all) : all)};
}

std::vector<int64_t> Finetune::ranks_below(const EntryConfig& entry) const {
  const auto adapter = adapter_of(entry);
  std::vector<int64_t> ranks;
  if (adapter && adapters::can_be_truncated(*adapter))
    std::ranges::copy_if(config_.evaluation.ranks, std::back_inserter(ranks),
                         [&](int64_t rank) { return rank < adapter->rank; });
  std::ranges::sort(ranks);
  return ranks;
}

Finetune::Stages Finetune::walk(PlanBuilder& plan) const {
  Stages stages;
  const auto test = [&](const std::string& label, const TaskConfig& task, const std::vector<std::string>& inputs,
                        auto& tests, const auto& key, int64_t rank = 0) {
    if (const auto id = plan.need(label, [&] { return evaluation_unit(label, task, inputs, rank); }))
      tests[key] = *id;
    else
      stages.complete = false;
  };
  for (const auto& task : config_.tasks)
    if (tasks_.at(task.name).classes == 0) test("test/base/" + task.name, task, {}, stages.base, task.name);
  for (const auto& entry : config_.adapters)
    for (const auto& task : config_.tasks)
      for (const int64_t seed : config_.all_seeds()) {
        Result result{&entry, &task, seed, {}, {}, {}};
        const std::string name = "train/" + result.name();
        result.artefact = plan.need(name, [&] { return train_unit(result); });
        stages.complete &= result.artefact.has_value();
        if (result.artefact)
          for (const auto& other : config_.tasks)
            if (&other == &task || (config_.evaluation.every_task && tasks_.at(other.name).classes == 0))
              test(fmt::format("test/{}/on/{}", result.name(), other.name), other, {*result.artefact}, result.tests,
                   other.name);
        if (result.artefact)
          for (const int64_t rank : ranks_below(entry))
            test(fmt::format("test/{}/rank{}", result.name(), rank), task, {*result.artefact}, result.at_ranks, rank,
                 rank);
        stages.results.push_back(std::move(result));
      }
  return stages;
}

Plan Finetune::plan(const RunState& state) const {
  PlanBuilder builder(state);
  walk(builder);
  return builder.finish();
}

std::optional<std::string> Finetune::missing_result(const RunState& state) const {
  PlanBuilder builder(state);
  if (walk(builder).complete) return std::nullopt;
  return "not every adapter is trained and scored";
}

}  // namespace moraine::algorithms::finetune
