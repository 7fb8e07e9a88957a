// Tables and curves of a run, out of its artefacts alone (docs/formats.md, summary.json).
#include <algorithm>
#include <cctype>
#include <cmath>
#include <map>
#include <set>

#include "algorithms/evaluate.h"
#include "algorithms/finetune/finetune.h"
#include "core/error.h"
#include "core/hash.h"

namespace moraine::algorithms::finetune {
namespace {

using core::Json;

Json column(const std::string& key, const std::string& label) { return {{"key", key}, {"label", label}}; }

// Trapezoids, divided by the width.
double area_under(const std::vector<std::pair<double, double>>& points) {
  double area = 0;
  for (size_t i = 1; i < points.size(); ++i)
    area += (points[i].first - points[i - 1].first) * (points[i].second + points[i - 1].second) / 2;
  return area / (points.back().first - points.front().first);
}

std::string capitalised(std::string text) {
  text[0] = static_cast<char>(std::toupper(static_cast<unsigned char>(text[0])));
  return text;
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

const objectives::Metric& Finetune::metric_of(const TaskConfig& task) const {
  return objectives::metric_of(tasks_.at(task.name).objective);
}

bool Finetune::one_metric() const {
  return std::ranges::all_of(config_.tasks,
                             [&](const TaskConfig& task) { return &metric_of(task) == &metric_of(config_.tasks[0]); });
}

// The metric stands in the table's title when all tasks share one.
std::string Finetune::labelled(const TaskConfig& task) const {
  return one_metric() ? task.name : fmt::format("{} ({})", task.name, metric_of(task).name);
}

std::optional<double> Finetune::tested(const RunState& state, const std::map<std::string, std::string>& tests,
                                       const std::string& task) const {
  const auto found = tests.find(task);
  if (found == tests.end()) return std::nullopt;
  const auto sums = Evaluation::from_json(state.artefact(found->second)->meta().at("result"));
  return objectives::metric_of(tasks_.at(task).objective).of(sums);
}

std::vector<double> Finetune::scores_of(const Stages& stages, const RunState& state, const EntryConfig& entry,
                                        const TaskConfig& trained_on, const TaskConfig& tested_on) const {
  std::vector<double> scores;
  for (const Result& result : stages.results)
    if (result.entry == &entry && result.task == &trained_on)
      if (const auto score = tested(state, result.tests, tested_on.name)) scores.push_back(*score);
  return scores;
}

Json Finetune::score_row(const Stages& stages, const RunState& state, const EntryConfig& entry) const {
  const adapters::Counts numbers = counts(entry);
  Json row = {
      {"adapter", entry.name}, {"type", type_of(entry)}, {"trained", numbers.trained}, {"stored", numbers.stored}};
  std::vector<double> means;
  double spread = 0;
  for (const auto& task : config_.tasks) {
    const std::vector<double> scores = scores_of(stages, state, entry, task, task);
    if (scores.empty()) continue;
    means.push_back(mean_of(scores));
    spread = std::max(spread, deviation_of(scores));
    row["task " + task.name] = means.back();
  }
  if (means.size() < config_.tasks.size()) return row;
  if (one_metric()) row["mean"] = mean_of(means);
  if (one_metric() && config_.all_seeds().size() > 1) row["spread"] = spread;
  return row;
}

Json Finetune::base_row(const Stages& stages, const RunState& state) const {
  Json row = {{"adapter", "base"}, {"type", "none"}, {"trained", 0}, {"stored", 0}};
  std::vector<double> scores;
  for (const auto& task : config_.tasks)
    if (const auto score = tested(state, stages.base, task.name)) {
      scores.push_back(*score);
      row["task " + task.name] = scores.back();
    }
  if (one_metric() && scores.size() == config_.tasks.size()) row["mean"] = mean_of(scores);
  return row;
}

void Finetune::summarize_scores(const Stages& stages, const RunState& state, Json& out) const {
  Json columns = {column("adapter", "adapter"), column("type", "type"), column("trained", "trained numbers"),
                  column("stored", "stored and sent")};
  const auto score_column = [](const std::string& key, const std::string& label, const objectives::Metric& metric) {
    const bool higher = metric.higher_is_better;
    return Json{{"key", key}, {"label", label}, {"better", higher ? "higher" : "lower"}, {"digits", higher ? 2 : 3}};
  };
  for (const auto& task : config_.tasks)
    columns.push_back(score_column("task " + task.name, labelled(task), metric_of(task)));
  const bool several = one_metric() && config_.tasks.size() > 1, seeds = one_metric() && config_.all_seeds().size() > 1;
  if (several) columns.push_back(score_column("mean", "mean", metric_of(config_.tasks[0])));
  if (seeds) columns.push_back({{"key", "spread"}, {"label", "largest deviation over seeds"}, {"digits", 4}});
  Json rows = {base_row(stages, state)};
  for (const auto& entry : config_.adapters) rows.push_back(score_row(stages, state, entry));
  if (stages.complete && one_metric()) out["headline"] = headline(rows);
  if (!several)
    for (Json& row : rows) row.erase("mean");
  Json notes = Json::array();
  const bool heads = std::ranges::any_of(tasks_, [](const auto& task) { return task.second.classes > 0; });
  if (heads) notes.push_back("numbers without the head that every task with classes trains beside");
  if (seeds)
    notes.push_back(
        fmt::format("means over {} seeds; deviation: of a sample, the largest over tasks", config_.all_seeds().size()));
  if (config_.evaluation.split != "test") notes.push_back("validation data, for choosing settings: not a result");
  const std::string metric = one_metric() ? metric_of(config_.tasks[0]).name : "Scores";
  out["tables"].push_back({{"title", fmt::format("{} on held-out data of the task trained on", capitalised(metric))},
                           {"columns", columns},
                           {"rows", rows},
                           {"highlight", true},
                           {"best_in", "column"},
                           {"notes", notes}});
}

std::string Finetune::headline(const Json& rows) const {
  const objectives::Metric& metric = metric_of(config_.tasks[0]);
  const Json* best = nullptr;
  for (const Json& row : rows) {
    if (&row == &rows.front() || !row.contains("mean")) continue;
    const double own = row.at("mean");
    if (best == nullptr || (metric.higher_is_better ? own > best->at("mean") : own < best->at("mean"))) best = &row;
  }
  if (best == nullptr) return "";
  const std::string base =
      rows.front().contains("mean") ? fmt::format(", the base has {:.3f}", rows.front().at("mean").get<double>()) : "";
  return fmt::format("{} fits best: {} {:.3f} in the mean over tasks{}.", best->at("adapter").get<std::string>(),
                     metric.name, best->at("mean").get<double>(), base);
}

void Finetune::summarize_every_task(const Stages& stages, const RunState& state, Json& out) const {
  if (!config_.evaluation.every_task || config_.tasks.size() < 2) return;
  Json columns = {column("adapter", "adapter"), column("trained_on", "trained on")}, rows = Json::array();
  for (const auto& task : config_.tasks)
    columns.push_back({{"key", "task " + task.name}, {"label", labelled(task)}, {"digits", 3}});
  for (const auto& entry : config_.adapters)
    for (const auto& task : config_.tasks) {
      Json row = {{"adapter", entry.name}, {"trained_on", task.name}};
      for (const auto& other : config_.tasks)
        if (const auto scores = scores_of(stages, state, entry, task, other); !scores.empty())
          row["task " + other.name] = mean_of(scores);
      rows.push_back(std::move(row));
    }
  const std::string metric = one_metric() ? ", " + metric_of(config_.tasks[0]).name : "";
  out["tables"].push_back({{"title", "Every result on every task" + metric},
                           {"columns", columns},
                           {"rows", rows},
                           {"notes", {"a task with classes is scored with its own head alone"}}});
}

// Scores at increasing ranks, and the areas under them: AURAC of MatryoshkaLoRA (arXiv 2605.07850), over ranks and over
// their logarithms.
Json Finetune::rank_row(const Stages& stages, const RunState& state, const EntryConfig& entry,
                        const TaskConfig& task) const {
  Json row = {{"adapter", entry.name}, {"task", task.name}};
  std::map<int64_t, std::vector<double>> scores;
  const objectives::Metric& metric = metric_of(task);
  for (const Result& result : stages.results) {
    if (result.entry != &entry || result.task != &task) continue;
    for (const auto& [rank, id] : result.at_ranks)
      scores[rank].push_back(metric.of(Evaluation::from_json(state.artefact(id)->meta().at("result"))));
    if (const auto whole = tested(state, result.tests, task.name)) scores[adapter_of(entry)->rank].push_back(*whole);
  }
  std::vector<std::pair<double, double>> points;
  for (const auto& [rank, values] : scores) {
    points.emplace_back(static_cast<double>(rank), mean_of(values));
    row[fmt::format("rank{}", rank)] = points.back().second;
  }
  if (points.size() < 2) return row;
  row["area"] = area_under(points);
  for (auto& [rank, score] : points) rank = std::log2(rank);
  row["area_log2"] = area_under(points);
  return row;
}

void Finetune::summarize_ranks(const Stages& stages, const RunState& state, Json& out) const {
  if (config_.evaluation.ranks.empty()) return;
  std::set<int64_t> ranks;
  Json rows = Json::array();
  for (const auto& entry : config_.adapters) {
    const std::vector<int64_t> below = ranks_below(entry);
    if (below.empty()) continue;
    ranks.insert(below.begin(), below.end());
    ranks.insert(adapter_of(entry)->rank);
    for (const auto& task : config_.tasks) rows.push_back(rank_row(stages, state, entry, task));
  }
  Json columns = {column("adapter", "adapter"), column("task", "task")};
  for (const int64_t rank : ranks)
    columns.push_back({{"key", fmt::format("rank{}", rank)}, {"label", fmt::format("rank {}", rank)}, {"digits", 3}});
  columns.push_back({{"key", "area"}, {"label", "AURAC over ranks"}, {"digits", 3}});
  columns.push_back({{"key", "area_log2"}, {"label", "AURAC over log2 ranks"}, {"digits", 3}});
  const std::string metric = one_metric() ? ", " + metric_of(config_.tasks[0]).name : "";
  out["tables"].push_back({{"title", "The first ranks alone" + metric},
                           {"columns", columns},
                           {"rows", rows},
                           {"notes",
                            {"AURAC: area under the scores, divided by the width; a plain LoRA's ranks are cut "
                             "off in the order they stand: a control"}}});
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
                             {"y_label", tasks_.at(task.name).classes > 0 ? "nats per example" : "nats per token"},
                             {"log_x", false},
                             {"log_y", false},
                             {"series", series},
                             {"notes", Json::array()}});
  }
}

// Of every result: where training ended, and the scores that decided it as a curve.
void Finetune::summarize_stopping(const Stages& stages, const RunState& state, Json& out) const {
  if (!config_.early_stopping) return;
  Json rows = Json::array();
  for (const auto& task : config_.tasks) {
    Json series = Json::array();
    for (const Result& result : stages.results) {
      if (result.task != &task || !result.artefact) continue;
      const auto record = StoppingRecord::from_json(state.artefact(*result.artefact)->meta().at("early_stopping"));
      rows.push_back({{"result", result.name()},
                      {"best_step", record.best_step},
                      {"steps", record.steps},
                      {"score", record.best_score()}});
      if (result.seed == config_.all_seeds().front())
        series.push_back({{"name", result.entry->name}, {"points", record.curve}});
    }
    if (series.empty()) continue;
    out["curves"].push_back({{"title", "Validation score on " + task.name},
                             {"x_label", "step"},
                             {"y_label", metric_of(task).name},
                             {"log_x", false},
                             {"log_y", false},
                             {"series", series},
                             {"notes", Json::array()}});
  }
  const Json columns = {column("result", "result"),
                        column("best_step", "best step"),
                        column("steps", "steps run"),
                        {{"key", "score"}, {"label", "best validation score"}, {"digits", 3}}};
  const EarlyStoppingConfig& stopping = *config_.early_stopping;
  const char* kept = stopping.restore_best ? "results have the parameters of the best step"
                                           : "results have the parameters of the last step run";
  out["tables"].push_back(
      {{"title", "Where training ended"},
       {"columns", columns},
       {"rows", rows},
       {"notes",
        {fmt::format("of {} steps at most, scored every {}; {}", config_.train.steps, stopping.every, kept)}}});
}

core::Json Finetune::summary(const RunState& state) const {
  PlanBuilder builder(state);
  const Stages stages = walk(builder);
  Json out = {{"tables", Json::array()}, {"curves", Json::array()}, {"heatmaps", Json::array()}, {"headline", ""}};
  summarize_scores(stages, state, out);
  summarize_every_task(stages, state, out);
  summarize_ranks(stages, state, out);
  summarize_curves(stages, state, out);
  summarize_stopping(stages, state, out);
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
