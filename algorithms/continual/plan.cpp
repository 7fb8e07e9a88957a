// What a continual run wants done: one pure walk per learner, order and seed. A chain of training units (or a fan-out,
// when the learner is not chained), each followed by one evaluation unit, which nothing waits for but the matrices at
// the end.
#include <algorithm>
#include <map>

#include "algorithms/continual/continual.h"
#include "algorithms/continual/draw.h"
#include "core/error.h"
#include "core/hash.h"

namespace moraine::algorithms::continual {
namespace {

// Raised when a change of the code changes what units of a kind give for the same spec; learners have their own.
int64_t result_version(const std::string& kind) {
  static const std::map<std::string, int64_t> versions = {{"evaluate", 1}, {"matrices", 1}, {"train_backbone", 1}};
  const auto found = versions.find(kind);
  return found == versions.end() ? learner_of_kind(kind).result_version() : found->second;
}

}  // namespace

std::string Continual::Track::name() const {
  return fmt::format("{}/order{}/seed{}", learner->name(), stream->order, seed);
}

Unit Continual::make_unit(const std::string& kind, const std::string& label, core::Json spec,
                          std::vector<std::string> inputs, double cost, const Stages& stages) const {
  spec["method"] = "continual";
  spec["version"] = result_version(kind);
  spec["compute"] = compute_identity(config_.workers);
  spec["images"] = {
      {"fingerprint", fingerprint_}, {"mean", config_.images.mean}, {"deviation", config_.images.deviation}};
  if (stages.backbone) {
    spec["backbone"] = *stages.backbone;
    if (stages.backbone->starts_with("random:")) spec["architecture"] = architecture_.to_json();
    if (stages.backbone->find(':') == std::string::npos)
      inputs.push_back(*stages.backbone);  // execute() finds it by id
  }
  if (spec.contains("stream")) spec["stream"]["draw"] = config_.stream_spec(spec["stream"].at("order").get<int64_t>());
  return {kind, label, std::move(spec), std::move(inputs), Place::kWorker, cost};
}

double Continual::evaluation_cost(const Track& track, int64_t after) const {
  const auto last = config_.evaluation.ahead ? static_cast<int64_t>(track.stream->tasks.size()) - 1 : after;
  double images = 0;
  for (int64_t task = 0; task <= last; ++task)
    images += static_cast<double>(track.stream->tasks[static_cast<size_t>(task)].test);
  return 2 * static_cast<double>(architecture_.backbone_parameters() * (architecture_.num_patches() + 1)) * images;
}

Unit Continual::evaluation_unit(const Track& track, int64_t after, const std::vector<std::string>& state,
                                const Stages& stages) const {
  // Before the first task every learner with a head is the backbone with initial head rows: one unit serves them all.
  const bool initial = after < 0;
  core::Json spec = {{"state", initial ? learner_of_kind("train_weights").kind() : track.learner->kind()},
                     {"parts", state.size()},
                     {"after", after},
                     {"stream", {{"order", track.stream->order}, {"hash", track.stream->hash}}},
                     {"ahead", config_.evaluation.ahead},
                     {"batch_size", config_.evaluation.batch_size}};
  if (!track.learner->accumulates()) spec["head_seed"] = head_seed(track.seed);
  if (track.learner->kind() == "train_lora" && !initial)
    spec["lora"] = adapters::adapter_schema().to_json(config_.lora);
  return make_unit("evaluate",
                   fmt::format("test/{}/{}", track.name(), initial ? "before" : fmt::format("after{}", after)),
                   std::move(spec), state, evaluation_cost(track, after), stages);
}

void Continual::walk_track(Track& track, const Stages& stages, PlanBuilder& plan) const {
  const double parameters =
      static_cast<double>(architecture_.backbone_parameters() * (architecture_.num_patches() + 1));
  const auto tasks = static_cast<int64_t>(track.stream->tasks.size());
  if (config_.evaluation.ahead && !track.learner->accumulates())
    track.initial = plan.need(evaluation_unit(track, -1, {}, stages));
  std::vector<std::string> before;
  track.evaluated.resize(static_cast<size_t>(tasks));
  bool whole = true;  // an accumulated state is what all tasks so far gave, or none
  for (int64_t task = 0; task < tasks; ++task) {
    std::vector<std::string> after = track.learner->accumulates() ? before : std::vector<std::string>();
    bool complete = whole || !track.learner->accumulates();
    for (auto& request : track.learner->units(config_, *track.stream, task, track.seed, before)) {
      const std::string label = track.learner->accumulates()
                                    ? fmt::format("train/{}/{}", track.learner->name(), request.label)
                                    : fmt::format("train/{}/{}", track.name(), request.label);
      const auto id = plan.need(label, [&] {
        request.spec["fresh"] = request.inputs.empty();
        Unit unit = make_unit(track.learner->kind(), label, std::move(request.spec), std::move(request.inputs),
                              6 * parameters * request.images, stages);
        if (track.learner->chained())
          unit.follows = unit.cost * static_cast<double>(tasks - 1 - task) + evaluation_cost(track, tasks - 1);
        return unit;
      });
      if (id) after.push_back(*id);
      complete &= id.has_value();
    }
    whole = complete;
    if (complete) {
      track.evaluated[static_cast<size_t>(task)] = plan.need(evaluation_unit(track, task, after, stages));
      track.states.push_back(after);
    } else if (track.learner->chained()) {
      return;  // the next task starts from this one
    }
    if (track.learner->chained() || track.learner->accumulates()) before = std::move(after);
  }
}

Continual::Stages Continual::walk(PlanBuilder& plan) const {
  Stages stages;
  if (!backbone_id_.empty()) {
    stages.backbone = backbone_id_;
  } else {
    const TrainConfig& train = *config_.model.train;
    const double parameters =
        static_cast<double>(architecture_.backbone_parameters() * (architecture_.num_patches() + 1));
    core::Json spec = {{"architecture", architecture_.to_json()},
                       {"data", backbone_fingerprint_},
                       {"train", train_identity(train)},
                       {"seed", core::derive_seed(static_cast<uint64_t>(config_.seed), "continual/backbone")}};
    stages.backbone =
        plan.need(make_unit("train_backbone", "train/backbone", std::move(spec), {},
                            6 * parameters * static_cast<double>(train.steps * train.batch_size), stages));
    if (!stages.backbone) return stages;
  }
  std::vector<std::string> evaluations;
  core::Json entries = core::Json::array();
  bool complete = true;
  for (const Learner* learner : learners()) {
    if (std::find(config_.methods.begin(), config_.methods.end(), learner->name()) == config_.methods.end()) continue;
    for (const auto& stream : streams_)
      for (const int64_t seed : config_.all_seeds()) {
        Track track{learner, &stream, seed, {}, {}, {}};
        walk_track(track, stages, plan);
        core::Json rows = core::Json::array();
        const auto note = [&](const std::optional<std::string>& id, bool needed) {
          complete &= id.has_value() || !needed;
          rows.push_back(id ? core::Json(evaluations.size()) : core::Json(nullptr));
          if (id) evaluations.push_back(*id);
        };
        note(track.initial, config_.evaluation.ahead && !learner->accumulates());
        for (const auto& id : track.evaluated) note(id, true);
        entries.push_back({{"name", track.name()}, {"rows", rows}});
        stages.tracks.push_back(std::move(track));
      }
  }
  if (!complete) return stages;
  Unit unit{"matrices",
            "matrices",
            {{"method", "continual"}, {"version", result_version("matrices")}, {"tracks", entries}},
            evaluations,
            Place::kCoordinator,
            1e6};
  stages.matrices = plan.need(std::move(unit));
  return stages;
}

std::optional<std::string> Continual::missing_result(const RunState& state) const {
  PlanBuilder builder(state);
  if (walk(builder).matrices) return std::nullopt;
  return "the accuracies of all methods are not complete";
}

Plan Continual::plan(const RunState& state) const {
  PlanBuilder builder(state);
  walk(builder);
  return builder.finish();
}

AccuracyMatrix Continual::matrix_of(const Track& track, Setting setting, const Stages& stages,
                                    const RunState& state) const {
  const auto tasks = track.stream->tasks.size();
  const char* key = setting == Setting::kClassIncremental ? "class_incremental" : "task_incremental";
  const auto row = [&](const std::optional<std::string>& id) {
    std::vector<std::optional<double>> cells(tasks);
    if (!id) return cells;
    const auto artefact = state.artefact(*id);
    const core::Json& result = artefact->meta().at("result");
    for (size_t j = 0; j < result.size(); ++j)
      if (!result[j].at(key).is_null())
        cells[j] = 100.0 * result[j].at(key).get<double>() / result[j].at("images").get<double>();
    return cells;
  };
  AccuracyMatrix matrix;
  for (const auto& task : track.stream->tasks) matrix.images.push_back(task.test);
  matrix.before = row(track.initial);
  for (const auto& id : track.evaluated) matrix.r.push_back(row(id));
  for (const auto& other : stages.tracks) {
    if (other.learner->name() != "joint" || other.stream != track.stream || other.seed != track.seed) continue;
    for (size_t k = 0; k < tasks; ++k) matrix.joint.push_back(row(other.evaluated[k])[k]);
  }
  return matrix;
}

}  // namespace moraine::algorithms::continual
