#include "algorithms/continual/ewc/ewc.h"

#include <algorithm>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "algorithms/continual/config.h"
#include "core/error.h"
#include "core/hash.h"
#include "data/permutation.h"
#include "models/tensor_io.h"

namespace moraine::algorithms::continual {
namespace {

constexpr const char *kWeight = "head.weight", *kBias = "head.bias";

/// One task, pulled back to the first input by the importance in the second.
struct TrainEwcSpec : TrainSpec {
  static constexpr const char* kKind = "train_ewc";
  static constexpr int64_t kVersion = 1;
  double strength = 0;
  static const core::Schema<TrainEwcSpec>& schema() {
    static const auto schema = [] {
      core::Schema<TrainEwcSpec> s;
      add_train_fields(s);
      s.field("strength", &TrainEwcSpec::strength);
      return s;
    }();
    return schema;
  }
};

/// Importance of every trained number for one task, added to that of the tasks before. Inputs: the trained state, and
/// the importance before.
struct ImportanceSpec : SiteSpec {
  static constexpr const char* kKind = "importance";
  static constexpr int64_t kVersion = 1;
  int64_t task = 0, samples = 1;
  uint64_t seed = 0;
  double decay = 1;
  bool fresh = true;  // there is none before
  std::optional<adapters::AdapterConfig> lora = {};
  std::optional<uint64_t> lora_seed = {};
  static const core::Schema<ImportanceSpec>& schema() {
    using C = ImportanceSpec;
    static const auto schema = [] {
      core::Schema<C> s;
      add_site_fields(s);
      s.field("task", &C::task)
          .field("samples", &C::samples)
          .min(1)
          .field("seed", &C::seed)
          .field("decay", &C::decay)
          .field("fresh", &C::fresh)
          .optional_object("lora", &C::lora, adapters::adapter_schema())
          .field("lora_seed", &C::lora_seed);
      return s;
    }();
    return schema;
  }
};

models::NamedTensors tensors_of(const core::Artefact& artefact, at::Device device) {
  models::NamedTensors out;
  for (const auto& view : artefact.file().tensors()) out.emplace_back(view.name, models::copy_of(view).to(device));
  return out;
}

// Values of `names` in `among`; of head rows the first ones, those of classes seen before, as in the importance.
models::NamedTensors alike(const models::NamedTensors& importance, const models::NamedTensors& among) {
  models::NamedTensors out;
  for (const auto& [name, tensor] : importance) {
    const auto found = std::ranges::find(among, name, &std::pair<std::string, at::Tensor>::first);
    MORAINE_CHECK(found != among.end(), "importance of '{}', which is not trained", name);
    const bool rows = name == kWeight || name == kBias;
    out.emplace_back(name, rows ? found->second.narrow(0, 0, tensor.size(0)) : found->second);
  }
  return out;
}

core::ArtefactPtr train_ewc(const Unit& unit, const LearnerSite& site) {
  const auto spec = core::from_spec(TrainEwcSpec::schema(), unit.spec);
  Trainee trainee = Trainee::of(unit, spec, site);
  TrainingHooks hooks;
  models::NamedTensors importance, anchors, parameters;
  if (trainee.before) {
    importance = tensors_of(*site.context.artefact(unit.inputs.at(1)), site.context.device());
    anchors = alike(importance, tensors_of(*trainee.before, site.context.device()));
    hooks.adjust = [&](const TrainJob& job) { parameters = job.parameters; };
    hooks.extra_loss = [&](const StepBatch& batch) {
      const at::Tensor penalty = ewc_penalty(alike(importance, parameters), anchors, importance);
      return spec.strength * static_cast<double>(batch.logits.size(0)) * penalty;
    };
  }
  return train_tasks(unit.kind, spec, trainee, site, training_in(site.config.learners.ewc, site.config.train), hooks);
}

core::ArtefactPtr measure_importance(const Unit& unit, const LearnerSite& site) {
  const auto spec = core::from_spec(ImportanceSpec::schema(), unit.spec);
  const auto state = site.context.artefact(unit.inputs.at(0));
  const Trainee trainee = Trainee::make(state, spec.lora, spec.lora_seed.value_or(0), /*head_only=*/false, site);
  models::NamedTensors parameters = trainee.parameters;
  parameters.emplace_back(kBias, trainee.head.bias.set_requires_grad(true));
  parameters.emplace_back(kWeight, trainee.head.weight.set_requires_grad(true));
  models::NamedTensors squares;
  for (const auto& [name, tensor] : parameters) squares.emplace_back(name, at::zeros_like(tensor.detach()));
  const auto& rows = site.stream->tasks.at(static_cast<size_t>(spec.task)).train;
  const auto count = std::min(spec.samples, static_cast<int64_t>(rows.size()));
  const auto measured = data::batch_of(rows, spec.seed, 0, count);
  for (int64_t i = 0; i < count; ++i) {
    const std::span<const int64_t> row(&measured[static_cast<size_t>(i)], 1);
    const at::Tensor scores = at::linear(trainee.fitted.model->features(site.examples->batch("train", row)),
                                         trainee.head.weight, trainee.head.bias);
    const auto label = std::ranges::find(trainee.head.labels, site.examples->labels("train", row).front());
    const at::Tensor truth = at::full({1}, label - trainee.head.labels.begin(), at::kLong).to(scores.device());
    at::cross_entropy_loss(scores, truth).backward();
    const at::NoGradGuard no_grad;
    for (size_t p = 0; p < parameters.size(); ++p) {
      at::Tensor& gradient = parameters[p].second.mutable_grad();
      if (!gradient.defined()) continue;  // a weight that features do not depend on
      squares[p].second.add_(gradient * gradient);
      gradient.reset();
    }
    site.context.progress(static_cast<double>(i + 1), static_cast<double>(count));
  }
  const at::NoGradGuard no_grad;
  for (auto& [name, square] : squares) square = square / static_cast<double>(count);
  if (!spec.fresh) {
    const auto old = tensors_of(*site.context.artefact(unit.inputs.at(1)), site.context.device());
    const auto sums = alike(old, squares);
    for (size_t i = 0; i < old.size(); ++i) at::Tensor(sums[i].second).add_(old[i].second, spec.decay);
  }
  for (auto& [name, square] : squares) square = square.cpu();
  std::vector<at::Tensor> keep;
  return core::Artefact::create(unit.kind, {{"examples", count}}, models::views_of(squares, keep));
}

std::optional<std::string> problem_of_importance(const Unit&, const core::Artefact& artefact, int64_t width) {
  const auto* weight = artefact.file().find(kWeight);
  if (weight != nullptr && weight->shape.size() == 2 && weight->shape[1] == width) return std::nullopt;
  return "has no importance of head rows";
}

}  // namespace

const core::Schema<EwcOptions>& ewc_schema() {
  using C = EwcOptions;
  static const auto schema = [] {
    core::Schema<C> s;
    add_training_options(s)
        .field("strength", &C::strength)
        .min(0)
        .doc("Weight of the penalty; higher keeps more of the old tasks and learns less")
        .field("decay", &C::decay)
        .min(0)
        .max(1)
        .doc("What is left of the importance of earlier tasks at every task")
        .field("samples", &C::samples)
        .min(1)
        .unit("examples")
        .doc("Examples of a task that importance is measured on, one backward pass each");
    return s;
  }();
  return schema;
}

at::Tensor ewc_penalty(const models::NamedTensors& values, const models::NamedTensors& anchors,
                       const models::NamedTensors& importance) {
  at::Tensor sum;
  for (size_t i = 0; i < values.size(); ++i) {
    const at::Tensor change = values[i].second - anchors[i].second;
    const at::Tensor term = (importance[i].second * change * change).sum();
    sum = sum.defined() ? sum + term : term;
  }
  return sum;
}

State Ewc::walk_task(TaskPlan& plan, int64_t task, const State& before) const {
  if (!before) return std::nullopt;
  const EwcOptions own = plan.config.learners.ewc.value_or(EwcOptions{});
  TrainEwcSpec spec;
  plan_task(spec, plan, task, *before);
  spec.strength = own.strength;
  ImportanceSpec measured;
  measured.task = task;
  measured.samples = own.samples;
  measured.seed = core::derive_seed(spec.seed, "importance");
  measured.decay = own.decay;
  measured.fresh = before->empty();
  measured.lora = spec.lora;
  measured.lora_seed = spec.lora_seed;
  const auto model = plan.need(std::move(spec), request(plan, task, *before));
  if (!model) return std::nullopt;
  UnitRequest unit{.label = fmt::format("importance{}", task), .inputs = {*model}};
  if (!measured.fresh) unit.inputs.push_back(before->at(1));
  unit.passes = 3 * static_cast<double>(own.samples);
  const auto importance = plan.need(std::move(measured), std::move(unit));
  return importance ? State({*model, *importance}) : std::nullopt;
}

std::vector<UnitKind> Ewc::unit_kinds() const {
  return {{TrainEwcSpec::kKind, train_ewc, problem_of_trained},
          {ImportanceSpec::kKind, measure_importance, problem_of_importance}};
}

TrainingOptions Ewc::options(const ContinualConfig& config) const { return config.learners.ewc.value_or(EwcOptions{}); }

}  // namespace moraine::algorithms::continual
