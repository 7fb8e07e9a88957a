// What a run wants done: a fan-out over adapters, tasks and seeds, each result followed by its evaluations.
#include "algorithms/adapters/parametrisation.h"
#include "algorithms/finetune/finetune.h"
#include "core/error.h"
#include "core/hash.h"

namespace moraine::algorithms::finetune {

std::string Finetune::Result::name() const { return fmt::format("{}/{}/seed{}", entry->name, task->name, seed); }

TextSpec Finetune::text_spec(const TaskConfig& task, const std::string& split) const {
  return {task.name, fingerprints_.at(task.name), split, config_.seq_len, config_.tokenizer};
}

Unit Finetune::train_unit(const Result& result) const {
  const auto seed = static_cast<uint64_t>(result.seed);
  TrainConfig train = config_.train;
  if (result.entry->learning_rate) train.learning_rate = *result.entry->learning_rate;
  if (result.entry->optimizer) train.optimizer = *result.entry->optimizer;
  const auto adapter = adapter_of(*result.entry);
  const TrainSpec spec{.type_version = adapter ? adapters::parametrisation(adapter->type).result_version() : 1,
                       .compute = compute_identity(config_.workers),
                       .base = model_id_,
                       .adapter = adapter,
                       .galore = result.entry->galore,
                       .start = result.entry->start.empty() ? "" : started_.at(result.entry->name).hash,
                       .data = text_spec(*result.task, "train"),
                       .adapter_seed = core::derive_seed(seed, "finetune/adapter"),
                       .data_seed = core::derive_seed(seed, "finetune/data/" + result.task->name),
                       .train = train_identity(train)};
  // Frozen weights take no gradients: 4 instead of 6 operations per parameter and token.
  const double operations = adapter ? 4 : 6;
  Unit unit{TrainSpec::kKind,
            "train/" + result.name(),
            core::to_spec(TrainSpec::schema(), spec),
            {},
            Place::kWorker,
            operations * static_cast<double>(architecture_.total_parameters()) *
                static_cast<double>(train.steps * train.batch_size * config_.seq_len)};
  unit.follows = evaluation_unit("", *result.task, {}).cost;
  return unit;
}

Unit Finetune::evaluation_unit(const std::string& label, const TaskConfig& task,
                               std::vector<std::string> inputs) const {
  const int64_t sequences = config_.evaluation.sequences;
  const EvaluateSpec spec{.compute = compute_identity(config_.workers),
                          .base = model_id_,
                          .dtype = config_.train.dtype,
                          .data = text_spec(task, config_.evaluation.split),
                          .sequences = sequences,
                          .batch_size = config_.evaluation.batch_size};
  const double tokens = static_cast<double>((sequences ? sequences : 512) * config_.seq_len);
  return {EvaluateSpec::kKind, label,          core::to_spec(EvaluateSpec::schema(), spec),
          std::move(inputs),   Place::kWorker, 2 * static_cast<double>(architecture_.total_parameters()) * tokens};
}

Finetune::Stages Finetune::walk(PlanBuilder& plan) const {
  Stages stages;
  const auto test = [&](const std::string& label, const TaskConfig& task, const std::vector<std::string>& inputs,
                        std::map<std::string, std::string>& tests) {
    if (const auto id = plan.need(label, [&] { return evaluation_unit(label, task, inputs); }))
      tests[task.name] = *id;
    else
      stages.complete = false;
  };
  for (const auto& task : config_.tasks) test("test/base/" + task.name, task, {}, stages.base);
  for (const auto& entry : config_.adapters)
    for (const auto& task : config_.tasks)
      for (const int64_t seed : config_.all_seeds()) {
        Result result{&entry, &task, seed, {}, {}};
        const std::string name = "train/" + result.name();
        result.artefact = plan.need(name, [&] { return train_unit(result); });
        stages.complete &= result.artefact.has_value();
        if (result.artefact)
          for (const auto& other : config_.tasks)
            if (&other == &task || config_.evaluation.every_task)
              test(fmt::format("test/{}/on/{}", result.name(), other.name), other, {*result.artefact}, result.tests);
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
