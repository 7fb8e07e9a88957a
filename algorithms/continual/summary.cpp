// Tables, curves and heat maps of a continual run, out of its artefacts alone (docs/formats.md, summary.json).
#include <algorithm>
#include <cmath>
#include <map>

#include "algorithms/continual/continual.h"
#include "core/error.h"

namespace moraine::algorithms::continual {
namespace {

using core::Json;
using Values = std::vector<double>;

double mean_of(const Values& values) {
  double sum = 0;
  for (const double value : values) sum += value;
  return sum / static_cast<double>(values.size());
}

// Sample standard deviation; null for a single value.
Json deviation_of(const Values& values) {
  if (values.size() < 2) return nullptr;
  const double mean = mean_of(values);
  double sum = 0;
  for (const double value : values) sum += (value - mean) * (value - mean);
  return std::sqrt(sum / static_cast<double>(values.size() - 1));
}

Json text_of(const Values& values) {
  if (values.empty()) return nullptr;
  const Json deviation = deviation_of(values);
  const double mean = std::abs(mean_of(values)) < 0.05 ? 0 : mean_of(values);  // no "-0.0"
  return deviation.is_null() ? fmt::format("{:.1f}", mean)
                             : fmt::format("{:.1f} ± {:.1f}", mean, deviation.get<double>());
}

struct Kept {
  int64_t bytes = 0, numbers = 0;
};

// What is stored for the model that a state is, beside the backbone.
Kept kept_in(const std::vector<std::string>& ids, const RunState& state) {
  Kept kept;
  for (const auto& id : ids) {
    const auto artefact = state.artefact(id);
    kept.bytes += static_cast<int64_t>(artefact->bytes().size());
    if (const auto buffer = artefact->meta().find("buffer"); buffer != artefact->meta().end())
      kept.bytes += buffer->at("bytes").get<int64_t>();  // of the examples whose rows it holds
    for (const auto& view : artefact->file().tensors()) kept.numbers += view.numel();
  }
  return kept;
}

Json column(const std::string& key, const std::string& label) { return {{"key", key}, {"label", label}}; }

Json percent_column(const std::string& key, const std::string& label, const char* better) {
  Json json = {{"key", key}, {"label", label}, {"digits", 1}};
  if (better != nullptr) json["better"] = better;
  return json;
}

}  // namespace

core::Json Continual::summary(const RunState& state) const {
  PlanBuilder builder(state);
  const Stages stages = walk(builder);
  Json out = {{"tables", Json::array()},
              {"curves", Json::array()},
              {"heatmaps", Json::array()},
              {"headline", ""},
              {"hash", stages.matrices.value_or("")}};
  for (const auto& stream : streams_) out["measured_on"][fmt::format("stream of order {}", stream.order)] = stream.hash;
  add_tables(out, stages, state);
  add_pictures(out, stages, state);
  return out;
}

void Continual::add_tables(Json& out, const Stages& stages, const RunState& state) const {
  constexpr Setting kClass = Setting::kClassIncremental, kTask = Setting::kTaskIncremental;
  // values[method][setting][metric]: one number per finished track.
  std::map<std::string, std::map<Setting, std::map<std::string, Values>>> values;
  std::map<std::string, int64_t> finished;
  Json runs = Json::array();
  for (const auto& track : stages.tracks) {
    std::map<Setting, AccuracyMatrix> matrix;
    for (const Setting setting : {kClass, kTask}) {
      matrix[setting] = matrix_of(track, setting, stages, state);
      for (const auto& info : metric_table())
        if (const auto value = metric(info.name, matrix[setting]))
          values[track.learner->name()][setting][info.name].push_back(*value);
    }
    const auto cell = [&](Setting setting, const char* name) {
      const auto value = metric(name, matrix[setting]);
      return value ? Json(*value) : Json(nullptr);
    };
    if (cell(kClass, "last_pooled").is_null()) continue;
    ++finished[track.learner->name()];
    runs.push_back({{"method", track.learner->name()},
                    {"order", std::to_string(track.stream->order)},
                    {"seed", track.seed},
                    {"average", cell(kClass, "average_pooled")},
                    {"last", cell(kClass, "last_pooled")},
                    {"forgetting", cell(kClass, "forgetting_chaudhry")},
                    {"task_last", cell(kTask, "last_taskmean")}});
  }
  if (finished.empty()) return;

  const auto of = [&](const std::string& method, Setting setting, const char* name) -> const Values& {
    return values[method][setting][name];
  };
  Json rows = Json::array();
  std::vector<const Learner*> present;
  for (const Learner* learner : learners())
    if (finished.count(learner->name())) present.push_back(learner);
  for (const Learner* learner : present) {
    const std::string name = learner->name();
    Json row = {{"method", name}, {"runs", finished[name]}};
    const auto put = [&](const char* key, Setting setting, const char* metric_name) {
      const Values& list = of(name, setting, metric_name);
      row[key] = list.empty() ? Json(nullptr) : Json(mean_of(list));
      row[std::string(key) + "_spread"] = list.empty() ? Json(nullptr) : deviation_of(list);
    };
    put("average", kClass, "average_pooled");
    put("last", kClass, "last_pooled");
    put("forgetting", kClass, "forgetting_chaudhry");
    put("task_last", kTask, "last_taskmean");
    rows.push_back(std::move(row));
  }
  Json notes = {
      "± is the sample standard deviation over orders and seeds; forgetting as Chaudhry (negative = gain); task mean: "
      "the example's task is given"};
  if (config_.evaluation.split == "validation")
    notes.push_back("validation examples, for choosing settings: not a result");
  out["tables"].push_back(
      {{"title", "Accuracy, %"},
       {"highlight", true},
       {"best_in", "column"},
       {"rows", rows},
       {"notes", notes},
       {"columns",
        {column("method", "method"), column("runs", "runs"),
         percent_column("average", "class-IL average, pooled", "higher"),
         percent_column("average_spread", "±", nullptr), percent_column("last", "class-IL last, pooled", "higher"),
         percent_column("last_spread", "±", nullptr), percent_column("forgetting", "class-IL forgetting", "lower"),
         percent_column("forgetting_spread", "±", nullptr),
         percent_column("task_last", "task-IL last, task mean", "higher"),
         percent_column("task_last_spread", "±", nullptr)}}});

  // Every metric asked for, by setting.
  for (const auto& [setting, title] :
       {std::pair{kClass, "Class-incremental metrics, %"}, {kTask, "Task-incremental metrics, %"}}) {
    Json columns = {column("metric", "metric"), column("convention", "convention")}, lines = Json::array(),
         missing = Json::array();
    for (const Learner* learner : present) columns.push_back(column(learner->name(), learner->name()));
    for (const auto& info : metric_table()) {
      const bool chosen = std::find(config_.metrics.begin(), config_.metrics.end(), info.name) != config_.metrics.end();
      if (config_.metrics.empty() ? !info.canonical : !chosen) continue;
      if (const auto reason = why_missing(info, offered(setting))) {
        missing.push_back(fmt::format("not in this setting: {}: {}", info.name, *reason));
        continue;
      }
      Json line = {{"metric", info.name}, {"convention", info.formula}};
      for (const Learner* learner : present) line[learner->name()] = text_of(of(learner->name(), setting, info.name));
      lines.push_back(std::move(line));
    }
    if (!lines.empty())
      out["tables"].push_back({{"title", title}, {"columns", columns}, {"rows", lines}, {"notes", missing}});
  }
  if (runs.size() > present.size())
    out["tables"].push_back({{"title", "Every run, %"},
                             {"rows", runs},
                             {"best_in", "column"},
                             {"columns",
                              {column("method", "method"), column("order", "order"), column("seed", "seed"),
                               percent_column("average", "class-IL average, pooled", nullptr),
                               percent_column("last", "class-IL last, pooled", nullptr),
                               percent_column("forgetting", "class-IL forgetting", nullptr),
                               percent_column("task_last", "task-IL last, task mean", nullptr)}}});

  // What a method costs: numbers that change, bytes that are kept for the model after the last task.
  Json costs = Json::array();
  for (const Learner* learner : present)
    for (const auto& track : stages.tracks) {
      if (track.learner != learner || !track.states.back()) continue;
      const Kept kept = kept_in(*track.states.back(), state);
      costs.push_back({{"method", learner->name()},
                       {"what", learner->title()},
                       {"numbers", kept.numbers},
                       {"share", 100.0 * static_cast<double>(kept.numbers) / static_cast<double>(model_.parameters)},
                       {"bytes", kept.bytes},
                       {"passes", learner->forward_passes(config_, static_cast<int64_t>(track.states.size()))}});
      break;
    }
  if (!costs.empty())
    out["tables"].push_back({{"title", "What is kept after the last task"},
                             {"rows", costs},
                             {"columns",
                              {column("method", "method"),
                               column("what", "what"),
                               column("numbers", "numbers"),
                               {{"key", "share"}, {"label", "% of the backbone"}, {"digits", 1}},
                               column("bytes", "bytes"),
                               column("passes", "forward passes per example")}},
                             {"notes", {fmt::format("backbone: {} parameters", model_.parameters)}}});

  const auto best = std::max_element(present.begin(), present.end(), [&](const Learner* a, const Learner* b) {
    const auto score = [&](const Learner* learner) {
      return learner->name() == "joint" ? -1.0 : mean_of(of(learner->name(), kClass, "last_pooled"));
    };
    return score(a) < score(b);
  });
  if ((*best)->name() != "joint" && present.size() > 1)
    out["headline"] = fmt::format(
        "{} keeps most: {:.1f} % over all classes after the last task{}.", (*best)->name(),
        mean_of(of((*best)->name(), kClass, "last_pooled")),
        finished.count("joint") ? fmt::format(", joint training {:.1f} %", mean_of(of("joint", kClass, "last_pooled")))
                                : "");
}

void Continual::add_pictures(Json& out, const Stages& stages, const RunState& state) const {
  Json accuracy = Json::array(), training = Json::array(), bytes = Json::array();
  if (stages.backbone && backbone_id_.empty())
    training.push_back({{"name", "backbone"}, {"points", state.artefact(*stages.backbone)->meta().at("curve")}});
  for (const Learner* learner : learners()) {
    std::vector<const Track*> tracks;
    for (const auto& track : stages.tracks)
      if (track.learner == learner) tracks.push_back(&track);
    if (tracks.empty()) continue;
    const size_t tasks = tracks.front()->stream->tasks.size();

    Json points = Json::array();
    for (size_t i = 0; i < tasks; ++i) {
      Values pooled;
      for (const Track* track : tracks)
        if (const auto value =
                pooled_accuracy(matrix_of(*track, Setting::kClassIncremental, stages, state), static_cast<int64_t>(i)))
          pooled.push_back(*value);
      if (!pooled.empty()) points.push_back({i + 1, mean_of(pooled)});
    }
    if (!points.empty()) accuracy.push_back({{"name", learner->name()}, {"points", points}});

    Json kept = Json::array();
    for (const State& after : tracks.front()->states)
      if (after) kept.push_back({kept.size() + 1, kept_in(*after, state).bytes});
    if (!kept.empty()) bytes.push_back({{"name", learner->name()}, {"points", kept}});

    // The first run's tasks one after the other.
    Json losses = Json::array();
    int64_t offset = 0;
    if (learner->chained())
      for (const auto& after : tracks.front()->states) {
        if (!after) break;
        Json curve = Json::array();  // of the newest artefact that has one
        for (auto id = after->rbegin(); id != after->rend() && curve.empty(); ++id)
          curve = state.artefact(*id)->meta().value("curve", Json::array());
        for (const auto& point : curve) losses.push_back({offset + point[0].get<int64_t>(), point[1]});
        if (!curve.empty()) offset += curve.back()[0].get<int64_t>();
      }
    if (!losses.empty()) training.push_back({{"name", learner->name()}, {"points", losses}});

    for (const auto& [setting, title] : {std::pair{Setting::kClassIncremental, "class-incremental"},
                                         {Setting::kTaskIncremental, "task-incremental"}}) {
      Json names = Json::array(), columns = Json::array(), cells = Json::array();
      bool any = false;
      std::vector<AccuracyMatrix> matrices;
      for (const Track* track : tracks) matrices.push_back(matrix_of(*track, setting, stages, state));
      const auto add_row = [&](const std::string& name, const auto& row_of) {
        Json line = Json::array();
        for (size_t j = 0; j < tasks; ++j) {
          Values list;
          for (const auto& matrix : matrices)
            if (const auto value = row_of(matrix)[j]) list.push_back(*value);
          line.push_back(list.empty() ? Json(nullptr) : Json(mean_of(list)));
          any |= !list.empty();
        }
        names.push_back(name);
        cells.push_back(std::move(line));
      };
      for (size_t j = 0; j < tasks; ++j) columns.push_back(fmt::format("task {}", j + 1));
      if (setting == Setting::kTaskIncremental && config_.evaluation.ahead)
        add_row("before", [](const AccuracyMatrix& m) { return m.before; });
      for (size_t i = 0; i < tasks; ++i)
        add_row(fmt::format("after task {}", i + 1), [i](const AccuracyMatrix& m) { return m.r[i]; });
      if (any)
        out["heatmaps"].push_back({{"title", fmt::format("{}: accuracy, {}, %", learner->name(), title)},
                                   {"row_label", "model"},
                                   {"column_label", "test examples of"},
                                   {"rows", names},
                                   {"columns", columns},
                                   {"values", cells},
                                   {"digits", 0},
                                   {"notes", {fmt::format("mean over {} runs", tracks.size())}}});
    }
  }
  if (!accuracy.empty())
    out["curves"].push_back(
        {{"title", "Class-incremental accuracy over all classes seen"},
         {"x_label", "tasks trained"},
         {"y_label", "% of test examples, pooled"},
         {"series", accuracy},
         {"notes",
          {fmt::format("mean over {} orders x {} seeds", config_.orders.size(), config_.all_seeds().size())}}});
  if (!bytes.empty())
    out["curves"].push_back({{"title", "What is kept beside the backbone"},
                             {"x_label", "tasks trained"},
                             {"y_label", "bytes"},
                             {"series", bytes},
                             {"notes", {"first order and seed; a buffer's examples count"}}});
  if (!training.empty())
    out["curves"].push_back({{"title", "Training loss"},
                             {"x_label", "step, tasks one after the other"},
                             {"y_label", "nats per example"},
                             {"series", training},
                             {"notes", {"chained methods, first order and seed"}}});
}

}  // namespace moraine::algorithms::continual
