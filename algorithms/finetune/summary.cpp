// Tables and curves of a run, out of its artefacts alone (docs/formats.md, summary.json).
#include <algorithm>
#include <cmath>

#include "algorithms/evaluate.h"
#include "algorithms/finetune/finetune.h"
#include "core/error.h"
#include "core/hash.h"

namespace moraine::algorithms::finetune {
namespace {

using core::Json;

Json column(const std::string& key, const std::string& label) { return {{"key", key}, {"label", label}}; }

Json score_column(const std::string& key, const std::string& label) {
  return {{"key", key}, {"label", label}, {"better", "lower"}, {"digits", 3}};
}

double mean_of(const std::vector<double>& values) {
  double sum = 0;
  for (const double value : values) sum += value;
  return sum / static_cast<double>(values.size());
}

// Of a sample: 0 for one value.
double deviation_of(const std::vector<double>& values) {
  if (values.size() < 2) return 0;
  const double mean = mean_of(values);
  double squares = 0;
  for (const double value : values) squares += (value - mean) * (value - mean);
  return std::sqrt(squares / static_cast<double>(values.size() - 1));
}

}  // namespace

std::optional<Evaluation> Finetune::tested(const RunState& state, const std::map<std::string, std::string>& tests,
                                           const std::string& task) const {
  const auto found = tests.find(task);
  if (found == tests.end()) return std::nullopt;
  return Evaluation::from_json(state.artefact(found->second)->meta().at("result"));
}

void Finetune::summarize_scores(const Stages& stages, const RunState& state, Json& out) const {
  Json columns = {column("adapter", "adapter"), column("type", "type"), column("trained", "trained numbers"),
                  column("stored", "stored and sent")};
  for (const auto& task : config_.tasks) columns.push_back(score_column("task " + task.name, task.name));
  columns.push_back(score_column("mean", "mean"));
  if (config_.all_seeds().size() > 1)
    columns.push_back({{"key", "spread"}, {"label", "largest deviation over seeds"}, {"digits", 4}});
  Json rows = Json::array();
  Json base = {{"adapter", "base"}, {"type", "none"}, {"trained", 0}, {"stored", 0}};
  std::vector<double> of_base;
  for (const auto& task : config_.tasks)
    if (const auto sums = tested(state, stages.base, task.name)) {
      of_base.push_back(sums->bits_per_byte());
      base["task " + task.name] = of_base.back();
    }
  if (of_base.size() == config_.tasks.size()) base["mean"] = mean_of(of_base);
  rows.push_back(base);
  std::string best;
  double lowest = 0;
  for (const auto& entry : config_.adapters) {
    const auto adapter = adapter_of(entry);
    const adapters::Counts numbers = counts(adapter, !entry.start.empty());
    Json row = {
        {"adapter", entry.name}, {"type", type_name(entry)}, {"trained", numbers.trained}, {"stored", numbers.stored}};
    std::vector<double> means;
    double spread = 0;
    for (const auto& task : config_.tasks) {
      std::vector<double> scores;
      for (const Result& result : stages.results)
        if (result.entry == &entry && result.task == &task)
          if (const auto sums = tested(state, result.tests, task.name)) scores.push_back(sums->bits_per_byte());
      if (scores.empty()) continue;
      means.push_back(mean_of(scores));
      spread = std::max(spread, deviation_of(scores));
      row["task " + task.name] = means.back();
    }
    if (means.size() == config_.tasks.size()) {
      row["mean"] = mean_of(means);
      if (config_.all_seeds().size() > 1) row["spread"] = spread;
      if (best.empty() || mean_of(means) < lowest) best = entry.name, lowest = mean_of(means);
    }
    rows.push_back(std::move(row));
  }
  Json notes = Json::array();
  if (config_.all_seeds().size() > 1)
    notes.push_back(
        fmt::format("means over {} seeds; deviation: of a sample, the largest over tasks", config_.all_seeds().size()));
  if (config_.evaluation.split != "test") notes.push_back("validation documents, for choosing settings: not a result");
  out["tables"].push_back({{"title", "Bits per byte on held-out documents of the task trained on"},
                           {"columns", columns},
                           {"rows", rows},
                           {"highlight", true},
                           {"best_in", "column"},
                           {"notes", notes}});
  if (!best.empty() && stages.complete)
    out["headline"] = fmt::format("{} fits best: {:.3f} bits per byte in the mean over tasks, the base has {:.3f}.",
                                  best, lowest, base.value("mean", 0.0));
}

void Finetune::summarize_every_task(const Stages& stages, const RunState& state, Json& out) const {
  if (!config_.evaluation.every_task || config_.tasks.size() < 2) return;
  Json columns = {column("adapter", "adapter"), column("trained_on", "trained on")}, rows = Json::array();
  for (const auto& task : config_.tasks)
    columns.push_back({{"key", "task " + task.name}, {"label", task.name}, {"digits", 3}});
  for (const auto& entry : config_.adapters)
    for (const auto& task : config_.tasks) {
      Json row = {{"adapter", entry.name}, {"trained_on", task.name}};
      for (const auto& other : config_.tasks) {
        std::vector<double> scores;
        for (const Result& result : stages.results)
          if (result.entry == &entry && result.task == &task)
            if (const auto sums = tested(state, result.tests, other.name)) scores.push_back(sums->bits_per_byte());
        if (!scores.empty()) row["task " + other.name] = mean_of(scores);
      }
      rows.push_back(std::move(row));
    }
  out["tables"].push_back({{"title", "Every result on every task, bits per byte"},
                           {"columns", columns},
                           {"rows", rows},
                           {"notes", Json::array()}});
}

void Finetune::summarize_curves(const Stages& stages, const RunState& state, Json& out) const {
  for (const auto& task : config_.tasks) {
    Json series = Json::array();
    for (const Result& result : stages.results)
      if (result.task == &task && result.artefact && result.seed == config_.all_seeds().front())
        series.push_back(
            {{"name", result.entry->name}, {"points", state.artefact(*result.artefact)->meta().at("curve")}});
    if (series.empty()) continue;
    out["curves"].push_back({{"title", "Training loss on " + task.name},
                             {"x_label", "step"},
                             {"y_label", "nats per token"},
                             {"log_x", false},
                             {"log_y", false},
                             {"series", series},
                             {"notes", Json::array()}});
  }
}

core::Json Finetune::summary(const RunState& state) const {
  PlanBuilder builder(state);
  const Stages stages = walk(builder);
  Json out = {{"tables", Json::array()}, {"curves", Json::array()}, {"heatmaps", Json::array()}, {"headline", ""}};
  summarize_scores(stages, state, out);
  summarize_every_task(stages, state, out);
  summarize_curves(stages, state, out);
  // One hash for all results, in the order of their names.
  std::vector<std::string> lines;
  for (const Result& result : stages.results)
    if (result.artefact) lines.push_back(result.name() + " " + *result.artefact + "\n");
  std::ranges::sort(lines);
  std::string text;
  for (const std::string& line : lines) text += line;
  out["hash"] = stages.complete ? core::sha256(text) : "";
  return out;
}

}  // namespace moraine::algorithms::finetune
