// What a worker does for a continual run: trains the backbone, runs learners' units, evaluates. The matrices are put
// together on the coordinator.
#include <algorithm>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/index_select.h>

#include "algorithms/continual/continual.h"
#include "algorithms/continual/draw.h"
#include "algorithms/continual/head.h"
#include "algorithms/language_model.h"
#include "core/error.h"
#include "core/hash.h"
#include "data/permutation.h"
#include "models/tensor_io.h"

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

}  // namespace

std::shared_ptr<const ImageSource> Continual::load_images(const std::string& path, const std::string& fingerprint,
                                                          const core::Json& spec, const models::VitConfig& shapes,
                                                          WorkerContext& context) const {
  const auto mean = spec.at("mean").get<double>(), deviation = spec.at("deviation").get<double>();
  const auto make = [&]() -> std::shared_ptr<void> {
    auto dataset = data::ImageDataset::open(path);
    if (dataset.info().fingerprint != fingerprint)
      throw core::UserError(fmt::format("algorithms/continual: {} changed since the run was planned", path),
                            "every worker must see the same prepared file; start again after copying it");
    return std::make_shared<ImageSource>(std::move(dataset), mean, deviation, shapes.num_channels, shapes.image_size,
                                         context.device());
  };
  return std::static_pointer_cast<const ImageSource>(context.cached(
      fmt::format("images/{}/{}/{}/{}x{}", fingerprint, mean, deviation, shapes.num_channels, shapes.image_size),
      make));
}

std::shared_ptr<const models::Vit> Continual::load_backbone(const Unit& unit, WorkerContext& context) const {
  const auto id = unit.spec.at("backbone").get<std::string>();
  const auto make = [&]() -> std::shared_ptr<void> {
    if (id.starts_with("random:"))
      return std::make_shared<models::Vit>(
          models::Vit::from_config(models::VitConfig::from_json(unit.spec.at("architecture"), "the unit's backbone"),
                                   std::stoull(id.substr(7)), at::kFloat)
              .on(context.device()));
    if (id.starts_with("dir:")) {
      if (id != backbone_id_)
        throw core::UserError(
            fmt::format("algorithms/continual: the backbone in {} differs from the coordinator's", config_.model.path),
            "every worker must use a byte-identical backbone");
      return std::make_shared<models::Vit>(open_backbone(config_.model, at::kFloat).on(context.device()));
    }
    const auto artefact = context.artefact(id);
    return std::make_shared<models::Vit>(models::Vit::from_tensors(artefact->meta().at("config"),
                                                                   artefact->file().tensors(),
                                                                   artefact->file().origin(), at::kFloat, artefact)
                                             .on(context.device()));
  };
  const std::string shapes = unit.spec.contains("architecture") ? unit.spec.at("architecture").dump() : "";
  return std::static_pointer_cast<const models::Vit>(context.cached("backbone/" + id + shapes, make));
}

// The stream a unit names; of units that belong to no order, one that has all classes.
data::TaskStreamSpec Continual::draw_of(const Unit& unit) {
  if (unit.spec.contains("stream")) return unit.spec.at("stream").at("draw").get<data::TaskStreamSpec>();
  data::TaskStreamSpec draw;
  draw.train_per_class = unit.spec.at("train_per_class").get<int64_t>();
  draw.validation_per_class = unit.spec.at("validation_per_class").get<int64_t>();
  draw.leave_out = unit.spec.at("leave_out").get<std::vector<int64_t>>();
  draw.seed = unit.spec.at("images_seed").get<uint64_t>();
  draw.evaluate_validation = true;  // nothing is asked of test images here
  return draw;
}

LearnerSite Continual::site_of(const Unit& unit, WorkerContext& context) const {
  const auto base = load_backbone(unit, context);
  const core::Json& spec = unit.spec.at("images");
  const auto fingerprint = spec.at("fingerprint").get<std::string>();
  const auto images = load_images(config_.images.path, fingerprint, spec, base->config(), context);
  const data::TaskStreamSpec draw = draw_of(unit);
  const auto make = [&]() -> std::shared_ptr<void> {
    return std::make_shared<data::TaskStream>(data::TaskStream::make(images->dataset(), draw));
  };
  const auto stream = std::static_pointer_cast<const data::TaskStream>(
      context.cached(fmt::format("stream/{}/{}", core::Json(draw).dump(), fingerprint), make));
  if (unit.spec.contains("stream") && stream->hash != unit.spec.at("stream").at("hash"))
    throw core::UserError(fmt::format("algorithms/continual: order {} makes another stream here than where it was "
                                      "planned",
                                      draw.order),
                          "every process must run the same build of Moraine");
  return {config_, context, base, images, stream, unit.spec};
}

core::ArtefactPtr Continual::execute(const Unit& unit, WorkerContext& context) const {
  if (unit.kind == "train_backbone") return train_backbone(unit, context);
  if (unit.kind == "matrices") return collect(unit, context);
  const LearnerSite site = site_of(unit, context);
  if (unit.kind == "evaluate") return evaluate(unit, site);
  return learner_of_kind(unit.kind).execute(unit, site);
}

core::ArtefactPtr Continual::train_backbone(const Unit& unit, WorkerContext& context) const {
  models::VitConfig config = models::VitConfig::from_json(unit.spec.at("architecture"), "the unit's backbone");
  const auto images = load_images(config_.model.data_path, unit.spec.at("data").get<std::string>(),
                                  unit.spec.at("images"), config, context);
  const auto seed = unit.spec.at("seed").get<uint64_t>();
  config.num_labels = images->dataset().info().num_classes();
  models::Vit vit = models::Vit::from_config(config, seed, at::kFloat).on(context.device());
  TrainJob job{train_config(unit.spec.at("train"), config_.model.train.value_or(TrainConfig{})), vit.make_trainable(),
               nullptr, /*tokens_per_sequence=*/1};
  std::vector<int64_t> rows(images->dataset().labels("train").size());
  for (size_t row = 0; row < rows.size(); ++row) rows[row] = static_cast<int64_t>(row);
  job.loss = [&, batch_size = job.config.batch_size](int64_t step, int64_t first, int64_t count) {
    const auto batch = data::batch_of(rows, seed, step * batch_size + first, count);
    std::vector<int64_t> labels = images->labels("train", batch);
    const at::Tensor expected =
        at::from_blob(labels.data(), {count}, at::kLong).to(context.device(), /*non_blocking=*/false, /*copy=*/true);
    return TrainJob::MicroLoss{
        at::cross_entropy_loss(vit.logits(images->batch("train", batch)), expected, {}, at::Reduction::Sum), count};
  };
  const TrainOutcome outcome = context.train(std::move(job));
  const models::Vit backbone = vit.backbone();
  models::NamedTensors weights;
  for (const auto& [name, weight] : backbone.weights()) weights.emplace_back(name, weight.cpu());
  std::vector<at::Tensor> keep;
  return core::Artefact::create("backbone", {{"config", backbone.config().to_json()}, {"curve", curve_json(outcome)}},
                                models::views_of(weights, keep));
}

core::ArtefactPtr Continual::evaluate(const Unit& unit, const LearnerSite& site) const {
  const at::NoGradGuard no_grad;
  const auto after = unit.spec.at("after").get<int64_t>();
  const auto parts = unit.spec.at("parts").get<size_t>();
  std::vector<core::ArtefactPtr> state;
  for (size_t part = 0; part < parts; ++part) state.push_back(site.context.artefact(unit.inputs.at(part)));
  const uint64_t seed = unit.spec.contains("head_seed") ? unit.spec.at("head_seed").get<uint64_t>() : 0;
  const auto classifier = learner_of_kind(unit.spec.at("state").get<std::string>()).classifier(state, seed, site);
  const auto seen = after < 0 ? std::vector<int64_t>() : site.stream->classes_until(after);
  const auto batch = static_cast<size_t>(unit.spec.at("batch_size").get<int64_t>());
  const auto last = unit.spec.at("ahead").get<bool>() ? static_cast<int64_t>(site.stream->tasks.size()) - 1 : after;
  core::Json result = core::Json::array();
  for (int64_t j = 0; j <= last; ++j) {
    const auto& task = site.stream->tasks[static_cast<size_t>(j)];
    const bool was_seen = j <= after;
    std::vector<int64_t> labels = seen;
    if (!was_seen) labels = task.classes;
    if (!std::all_of(labels.begin(), labels.end(), [&](int64_t label) { return classifier->knows(label); })) {
      result.push_back({{"images", task.test.size()}, {"class_incremental", nullptr}, {"task_incremental", nullptr}});
      continue;
    }
    const auto own = positions(labels, task.classes), all = positions(labels, labels);
    int64_t among_own = 0, among_all = 0;
    for (size_t first = 0; first < task.test.size(); first += batch) {
      const auto rows = std::span(task.test).subspan(first, std::min(batch, task.test.size() - first));
      const at::Tensor scores = classifier->scores(site.images->batch(site.stream->evaluated_split, rows), labels);
      if (!scores.isfinite().all().item<bool>())
        throw core::NumericError(fmt::format("algorithms/continual: {} gives scores that are not finite", unit.label),
                                 "look at the training curve of this run; lower train.learning_rate");
      const auto truth = positions(labels, site.images->labels(site.stream->evaluated_split, rows));
      among_own += hits(scores, own, truth);
      among_all += hits(scores, all, truth);
    }
    result.push_back({{"images", task.test.size()},
                      {"class_incremental", was_seen ? core::Json(among_all) : core::Json(nullptr)},
                      {"task_incremental", among_own}});
    site.context.progress(static_cast<double>(j + 1), static_cast<double>(last + 1));
  }
  return core::Artefact::create("evaluation", {{"after", after}, {"result", result}}, {});
}

core::ArtefactPtr Continual::collect(const Unit& unit, WorkerContext& context) const {
  // Row 0 is before the first task, row i + 1 after task i; kNotEvaluated where there is no accuracy: artefacts hold no
  // NaN.
  std::vector<std::vector<double>> keep;
  std::vector<core::TensorView> views;
  for (const auto& track : unit.spec.at("tracks")) {
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
