// What a continual run wants done: one pure walk per learner, order and seed, which asks the learner for the state
// after each task. Every state is followed by one evaluation unit, which nothing waits for but the matrices at the end.
#include <algorithm>

#include "algorithms/continual/continual.h"
#include "algorithms/continual/draw.h"
#include "core/error.h"
#include "core/hash.h"

namespace moraine::algorithms::continual {
namespace {

const std::string kInitialState = "train_weights";  // of the backbone with initial head rows

}  // namespace

std::string Continual::Track::name() const {
  return fmt::format("{}/order{}/seed{}", learner->name(), stream->order, seed);
}

SiteSpec Continual::site_spec(const Stages& stages, const StreamFacts* stream) const {
  SiteSpec spec;
  spec.compute = compute_identity(config_.workers);
  if (config_.images)
    spec.images = ImagesSpec{fingerprint_, config_.images->mean, config_.images->deviation};
  else
    spec.texts = TextsSpec{fingerprint_};
  spec.backbone = stages.backbone.value_or("");
  if (spec.backbone.starts_with("random:")) spec.architecture = model_.config;
  if (stream != nullptr)
    spec.stream = StreamSpec{stream->order, stream->hash, config_.stream_spec(stream->order, file_classes_)};
  return spec;
}

Unit Continual::make_unit(const std::string& kind, const std::string& label, core::Json spec,
                          std::vector<std::string> inputs, double cost, const Stages& stages) const {
  if (stages.backbone && stages.backbone->find(':') == std::string::npos)
    inputs.push_back(*stages.backbone);  // execute() finds it by id
  return {kind, label, std::move(spec), std::move(inputs), Place::kWorker, cost};
}

double Continual::pass_cost() const { return 2 * static_cast<double>(model_.parameters * tokens_); }

double Continual::evaluation_cost(const Track& track, int64_t after) const {
  const auto last = config_.evaluation.ahead ? static_cast<int64_t>(track.stream->tasks.size()) - 1 : after;
  double examples = 0;
  for (int64_t task = 0; task <= last; ++task)
    examples += static_cast<double>(track.stream->tasks[static_cast<size_t>(task)].test);
  return pass_cost() * examples;
}

Unit Continual::evaluation_unit(const Track& track, int64_t after, const std::vector<std::string>& state,
                                const Stages& stages) const {
  // Before the first task every learner with a head is the backbone with initial head rows: one unit serves them all.
  const bool initial = after < 0;
  EvaluateSpec spec;
  static_cast<SiteSpec&>(spec) = site_spec(stages, track.stream);
  spec.version = EvaluateSpec::kVersion;
  spec.state = initial ? kInitialState : track.learner->state_kind();
  spec.parts = static_cast<int64_t>(state.size());
  spec.after = after;
  spec.ahead = config_.evaluation.ahead;
  spec.batch_size = config_.evaluation.batch_size;
  if (track.learner->has_head()) spec.head_seed = head_seed(track.seed);
  if (!initial) track.learner->describe(config_, track.seed, spec);
  return make_unit(EvaluateSpec::kKind,
                   fmt::format("test/{}/{}", track.name(), initial ? "before" : fmt::format("after{}", after)),
                   core::to_spec(EvaluateSpec::schema(), spec), state, evaluation_cost(track, after), stages);
}

std::optional<std::string> Continual::ask(const Track& track, int64_t task, const std::string& kind,
                                          UnitRequest request, const TaskPlan::MakeSpec& make, const Stages& stages,
                                          PlanBuilder& plan) const {
  const std::string label =
      fmt::format("train/{}/{}", request.of_run ? track.name() : track.learner->name(), request.label);
  return plan.need(label, [&] {
    if (find_unit_kind(kind).merges) {
      SiteSpec site;
      site.compute = compute_identity(config_.workers);
      return Unit{kind, label, make(std::move(site)), std::move(request.inputs), Place::kCoordinator, 1e6};
    }
    Unit unit = make_unit(kind, label, make(site_spec(stages, request.of_run ? track.stream : nullptr)),
                          std::move(request.inputs), pass_cost() * request.passes, stages);
    const auto tasks = static_cast<int64_t>(track.stream->tasks.size());
    if (request.of_run && track.learner->chained())
      unit.follows = unit.cost * static_cast<double>(tasks - 1 - task) + evaluation_cost(track, tasks - 1);
    return unit;
  });
}

void Continual::walk_track(Track& track, const Stages& stages, PlanBuilder& plan) const {
  if (config_.evaluation.ahead && track.learner->has_head())
    track.initial = plan.need(evaluation_unit(track, -1, {}, stages));
  State state = std::vector<std::string>();
  for (int64_t task = 0; task < static_cast<int64_t>(track.stream->tasks.size()); ++task) {
    TaskPlan own(config_, *track.stream, track.seed,
                 [&](const std::string& kind, UnitRequest request, const TaskPlan::MakeSpec& make) {
                   return ask(track, task, kind, std::move(request), make, stages, plan);
                 });
    state = track.learner->walk_task(own, task, state);
    track.states.push_back(state);
    std::vector<std::string> scored = state.value_or(std::vector<std::string>());
    scored.resize(track.learner->parts_scored(scored.size()));
    track.evaluated.push_back(state ? plan.need(evaluation_unit(track, task, scored, stages)) : std::nullopt);
  }
}

std::optional<std::string> Continual::train_backbone_unit(PlanBuilder& plan) const {
  const TrainConfig& train = *config_.model.train;
  BackboneSpec spec;
  static_cast<SiteSpec&>(spec) = site_spec({}, nullptr);
  spec.version = BackboneSpec::kVersion;
  spec.architecture = model_.config;
  spec.data = backbone_fingerprint_;
  spec.train = train_identity(train);
  spec.seed = core::derive_seed(static_cast<uint64_t>(config_.seed), "continual/backbone");
  return plan.need(make_unit(BackboneSpec::kKind, "train/backbone", core::to_spec(BackboneSpec::schema(), spec), {},
                             3 * pass_cost() * static_cast<double>(train.steps * train.batch_size), {}));
}

Continual::Stages Continual::walk(PlanBuilder& plan) const {
  Stages stages;
  stages.backbone = backbone_id_.empty() ? train_backbone_unit(plan) : backbone_id_;
  if (!stages.backbone) return stages;
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
        note(track.initial, config_.evaluation.ahead && learner->has_head());
        for (const auto& id : track.evaluated) note(id, true);
        entries.push_back({{"name", track.name()}, {"rows", rows}});
        stages.tracks.push_back(std::move(track));
      }
  }
  if (!complete) return stages;
  MatricesSpec spec;
  spec.version = MatricesSpec::kVersion;
  spec.tracks = std::move(entries);
  stages.matrices = plan.need({MatricesSpec::kKind, "matrices", core::to_spec(MatricesSpec::schema(), spec),
                               std::move(evaluations), Place::kCoordinator, 1e6});
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
