// What a worker does for a continual run: trains the backbone, runs learners' units, evaluates. The matrices are put
// together on the coordinator.
#include <algorithm>
#include <functional>
#include <numeric>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/index_select.h>

#include "algorithms/continual/continual.h"
#include "algorithms/continual/draw.h"
#include "algorithms/language_model.h"
#include "core/error.h"
#include "core/hash.h"
#include "data/permutation.h"
#include "models/tensor_io.h"
#include "models/vit.h"

namespace moraine::algorithms::continual {
namespace {

// How many of the images whose true class stands at `truth[row]` of the candidates score highest there. NaN never wins
// a place, so a broken model is an error and no silent zero.
int64_t hits(const at::Tensor& scores, const std::vector<int64_t>& candidates, const std::vector<int64_t>& truth) {
  std::vector<int64_t> columns = candidates;
  const at::Tensor index =
      at::from_blob(columns.data(), {static_cast<int64_t>(columns.size())}, at::kLong).to(scores.device());
  const at::Tensor best = at::argmax(at::index_select(scores, 1, index), 1).cpu();
  const int64_t* chosen = best.const_data_ptr<int64_t>();
  int64_t correct = 0;
  for (size_t row = 0; row < truth.size(); ++row) correct += candidates[static_cast<size_t>(chosen[row])] == truth[row];
  return correct;
}

// Positions of `wanted` in `labels`.
std::vector<int64_t> positions(const std::vector<int64_t>& labels, const std::vector<int64_t>& wanted) {
  std::vector<int64_t> out;
  for (const int64_t label : wanted) out.push_back(std::find(labels.begin(), labels.end(), label) - labels.begin());
  return out;
}

// Examples that are opened once per worker, if they are those that were planned with.
std::shared_ptr<const ExampleSource> checked(const std::string& key, const std::string& fingerprint,
                                             const std::function<std::shared_ptr<const ExampleSource>()>& open,
                                             WorkerContext& context) {
  const auto make = [&]() -> std::shared_ptr<void> {
    const auto examples = open();
    if (examples->set().fingerprint != fingerprint)
      throw core::UserError(
          fmt::format("algorithms/continual: {} changed since the run was planned", examples->set().path),
          "every worker must see the same prepared file; start again after copying it");
    return std::const_pointer_cast<ExampleSource>(examples);
  };
  return std::static_pointer_cast<const ExampleSource>(context.cached("examples/" + key, make));
}

}  // namespace

std::shared_ptr<const models::Backbone> Continual::load_backbone(const SiteSpec& spec, WorkerContext& context) const {
  const std::string& id = spec.backbone;
  const auto open = [&]() -> std::shared_ptr<models::Backbone> {
    if (id.starts_with("random:"))
      return std::make_shared<models::Vit>(
          models::Vit::from_config(models::VitConfig::from_json(spec.architecture, "the unit's backbone"),
                                   std::stoull(id.substr(7)), at::kFloat));
    if (id.starts_with("dir:")) {
      if (id != backbone_id_)
        throw core::UserError(
            fmt::format("algorithms/continual: the backbone in {} differs from the coordinator's", config_.model.path),
            "every worker must use a byte-identical backbone");
      return open_backbone(config_.model, at::kFloat);
    }
    const auto artefact = context.artefact(id);
    return std::make_shared<models::Vit>(models::Vit::from_tensors(
        artefact->meta().at("config"), artefact->file().tensors(), artefact->file().origin(), at::kFloat, artefact));
  };
  const auto make = [&]() -> std::shared_ptr<void> {
    return std::shared_ptr<models::Backbone>(open()->shared_on(context.device()));
  };
  const std::string shapes = spec.architecture.is_null() ? "" : spec.architecture.dump();
  return std::static_pointer_cast<const models::Backbone>(context.cached("backbone/" + id + shapes, make));
}

std::shared_ptr<const ExampleSource> Continual::load_images(const std::string& path, const ImagesSpec& spec,
                                                            const std::string& fingerprint,
                                                            const models::ModelFacts& model,
                                                            WorkerContext& context) const {
  const auto open = [&] { return open_images({path, spec.mean, spec.deviation}, model, context.device()); };
  return checked(
      fmt::format("{}/{}/{}/{}x{}", fingerprint, spec.mean, spec.deviation, model.channels, model.image_size),
      fingerprint, open, context);
}

std::shared_ptr<const ExampleSource> Continual::load_examples(const SiteSpec& spec, const models::ModelFacts& model,
                                                              WorkerContext& context) const {
  if (spec.images.has_value() != config_.images.has_value())
    throw core::UserError("algorithms/continual: this site's recipe has other examples than the unit",
                          "give every process the same recipe");
  if (spec.images) return load_images(config_.images->path, *spec.images, spec.images->fingerprint, model, context);
  const std::string& fingerprint = spec.texts->fingerprint;
  const auto open = [&] { return open_texts(config_.text_paths(), model, config_.model.path, context.device()); };
  return checked(fingerprint, fingerprint, open, context);
}

LearnerSite Continual::site_of(const Unit& unit, WorkerContext& context) const {
  const SiteSpec spec = SiteSpec::of(unit.spec);
  const auto base = load_backbone(spec, context);
  const auto* vit = dynamic_cast<const models::Vit*>(base.get());
  const auto examples = load_examples(spec, vit != nullptr ? vit_shapes(vit->config()) : model_, context);
  LearnerSite site{config_, context, base, examples, nullptr};
  if (!spec.stream) return site;
  const auto draw = spec.stream->draw.get<data::TaskStreamSpec>();
  const auto make = [&]() -> std::shared_ptr<void> {
    return std::make_shared<data::TaskStream>(data::TaskStream::make(examples->set(), draw));
  };
  site.stream = std::static_pointer_cast<const data::TaskStream>(
      context.cached(fmt::format("stream/{}/{}", core::Json(draw).dump(), examples->set().fingerprint), make));
  if (site.stream->hash != spec.stream->hash)
    throw core::UserError(fmt::format("algorithms/continual: order {} makes another stream here than where it was "
                                      "planned",
                                      draw.order),
                          "every process must run the same build of Moraine");
  return site;
}

core::ArtefactPtr Continual::execute(const Unit& unit, WorkerContext& context) const {
  if (unit.kind == BackboneSpec::kKind) return train_backbone(unit, context);
  if (unit.kind == MatricesSpec::kKind) return collect(unit, context);
  if (unit.kind == EvaluateSpec::kKind) return evaluate(unit, site_of(unit, context));
  const UnitKind& kind = find_unit_kind(unit.kind);
  return kind.execute(unit,
                      kind.merges ? LearnerSite{config_, context, nullptr, nullptr, nullptr} : site_of(unit, context));
}

core::ArtefactPtr Continual::train_backbone(const Unit& unit, WorkerContext& context) const {
  const auto spec = core::from_spec(BackboneSpec::schema(), unit.spec);
  models::VitConfig config = models::VitConfig::from_json(spec.architecture, "the unit's backbone");
  const auto images = load_images(config_.model.data_path, *spec.images, spec.data, vit_shapes(config), context);
  config.num_labels = static_cast<int64_t>(images->set().class_names.size());
  models::Vit vit = models::Vit::from_config(config, spec.seed, at::kFloat).on(context.device());
  TrainJob job{train_config(spec.train, config_.model.train.value_or(TrainConfig{})), vit.make_trainable(), nullptr,
               /*tokens_per_sequence=*/1};
  std::vector<int64_t> rows(images->set().train.size());
  std::iota(rows.begin(), rows.end(), 0);
  job.loss = [&, batch_size = job.config.batch_size](int64_t step, int64_t first, int64_t count) {
    const auto batch = data::batch_of(rows, spec.seed, step * batch_size + first, count);
    std::vector<int64_t> labels = images->labels("train", batch);
    const at::Tensor expected =
        at::from_blob(labels.data(), {count}, at::kLong).to(context.device(), /*non_blocking=*/false, /*copy=*/true);
    const at::Tensor logits = vit.logits(images->batch("train", batch).images);
    return TrainJob::MicroLoss{at::cross_entropy_loss(logits, expected, {}, at::Reduction::Sum), count};
  };
  const TrainOutcome outcome = context.train(std::move(job));
  const models::Vit backbone = vit.backbone();
  models::NamedTensors weights;
  for (const auto& [name, weight] : backbone.weights()) weights.emplace_back(name, weight.cpu());
  std::vector<at::Tensor> keep;
  return core::Artefact::create("backbone", {{"config", backbone.config().to_json()}, {"curve", curve_json(outcome)}},
                                models::views_of(weights, keep));
}

namespace {

// Hits of one task among all classes of `labels` and among its own, out of the same scores unless the classifier makes
// use of the task.
std::pair<int64_t, int64_t> score_task(Classifier& classifier, const data::TaskStream& stream, int64_t task,
                                       const std::vector<int64_t>& labels, size_t batch_size, const Unit& unit,
                                       const ExampleSource& examples) {
  const auto& own = stream.tasks[static_cast<size_t>(task)];
  const auto own_places = positions(labels, own.classes), all_places = positions(labels, labels);
  int64_t among_all = 0, among_own = 0;
  for (size_t first = 0; first < own.test.size(); first += batch_size) {
    const auto rows = std::span(own.test).subspan(first, std::min(batch_size, own.test.size() - first));
    const models::Input batch = examples.batch(stream.evaluated_split, rows);
    const at::Tensor scores = classifier.scores(batch, labels, std::nullopt);
    const at::Tensor told = classifier.uses_task() ? classifier.scores(batch, labels, task) : scores;
    if (!scores.isfinite().all().item<bool>() || !told.isfinite().all().item<bool>())
      throw core::NumericError(fmt::format("algorithms/continual: {} gives scores that are not finite", unit.label),
                               "look at the training curve of this run; lower train.learning_rate");
    const auto truth = positions(labels, examples.labels(stream.evaluated_split, rows));
    among_own += hits(told, own_places, truth);
    among_all += hits(scores, all_places, truth);
  }
  return {among_all, among_own};
}

}  // namespace

core::ArtefactPtr Continual::evaluate(const Unit& unit, const LearnerSite& site) const {
  const at::NoGradGuard no_grad;
  const auto spec = core::from_spec(EvaluateSpec::schema(), unit.spec);
  std::vector<core::ArtefactPtr> state;
  for (int64_t part = 0; part < spec.parts; ++part)
    state.push_back(site.context.artefact(unit.inputs.at(static_cast<size_t>(part))));
  const auto classifier = learner_of_state(spec.state).classifier(state, spec, site);
  const auto seen = spec.after < 0 ? std::vector<int64_t>() : site.stream->classes_until(spec.after);
  const auto last = spec.ahead ? static_cast<int64_t>(site.stream->tasks.size()) - 1 : spec.after;
  core::Json result = core::Json::array();
  for (int64_t j = 0; j <= last; ++j) {
    const auto& task = site.stream->tasks[static_cast<size_t>(j)];
    const bool was_seen = j <= spec.after;
    const std::vector<int64_t>& labels = was_seen ? seen : task.classes;
    core::Json cell = {{"images", task.test.size()}, {"class_incremental", nullptr}, {"task_incremental", nullptr}};
    if (std::ranges::all_of(labels, [&](int64_t label) { return classifier->knows(label); })) {
      const auto [among_all, among_own] =
          score_task(*classifier, *site.stream, j, labels, static_cast<size_t>(spec.batch_size), unit, *site.examples);
      if (was_seen) cell["class_incremental"] = among_all;
      cell["task_incremental"] = among_own;
      site.context.progress(static_cast<double>(j + 1), static_cast<double>(last + 1));
    }
    result.push_back(std::move(cell));
  }
  return core::Artefact::create("evaluation", {{"after", spec.after}, {"result", result}}, {});
}

core::ArtefactPtr Continual::collect(const Unit& unit, WorkerContext& context) const {
  // Row 0 is before the first task, row i + 1 after task i; kNotEvaluated where there is no accuracy: artefacts hold no
  // NaN.
  std::vector<std::vector<double>> keep;
  std::vector<core::TensorView> views;
  for (const auto& track : core::from_spec(MatricesSpec::schema(), unit.spec).tracks) {
    const core::Json& rows = track.at("rows");
    const size_t tasks = rows.size() - 1;
    for (const char* key : {"class_incremental", "task_incremental"}) {
      auto& values = keep.emplace_back((tasks + 1) * tasks, kNotEvaluated);
      for (size_t i = 0; i <= tasks; ++i) {
        if (rows[i].is_null()) continue;
        const auto artefact = context.artefact(unit.inputs.at(rows[i].get<size_t>()));
        const core::Json& result = artefact->meta().at("result");
        for (size_t j = 0; j < result.size(); ++j)
          if (!result[j].at(key).is_null())
            values[i * tasks + j] = 100.0 * result[j].at(key).get<double>() / result[j].at("images").get<double>();
      }
      views.push_back({fmt::format("{}/{}", track.at("name").get<std::string>(), key),
                       core::DType::kF64,
                       {static_cast<int64_t>(tasks + 1), static_cast<int64_t>(tasks)},
                       std::as_bytes(std::span(values))});
    }
  }
  return core::Artefact::create("accuracy_matrices", core::Json::object(), views);
}

}  // namespace moraine::algorithms::continual
