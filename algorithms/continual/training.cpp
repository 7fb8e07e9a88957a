#include "algorithms/continual/training.h"

#include <algorithm>
#include <map>
#include <utility>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/linear.h>

#include "algorithms/adapters/parametrisation.h"
#include "algorithms/continual/config.h"
#include "algorithms/language_model.h"
#include "algorithms/objectives/labelled.h"
#include "core/error.h"
#include "core/hash.h"
#include "data/permutation.h"
#include "models/tensor_io.h"

namespace moraine::algorithms::continual {
namespace {

constexpr const char *kAdapterPrefix = "lora.", *kHeadPrefix = "head.";

// What is trained of an adapter and what it keeps, as in artefacts.
models::NamedTensors everything(const adapters::Adapter& adapter) {
  models::NamedTensors all;
  for (const auto& part : {adapter.parameters(), adapter.state()})
    for (const auto& [name, tensor] : part) all.emplace_back(kAdapterPrefix + name, tensor);
  return all;
}

void load(const core::Artefact& artefact, const adapters::Adapter& adapter) {
  const at::NoGradGuard no_grad;
  for (const auto& [name, tensor] : everything(adapter)) {
    const auto* stored = artefact.file().find(name);
    MORAINE_CHECK(stored != nullptr && stored->shape == tensor.sizes().vec(),
                  "an adapter's artefact has no '{}' of its shape", name);
    at::Tensor(tensor).copy_(models::copy_of(*stored));
  }
}

// All weights of a model in an artefact; empty when it holds none.
std::vector<core::TensorView> weights_in(const core::Artefact& artefact, const models::Backbone& base) {
  std::vector<core::TensorView> weights;
  for (const auto& view : artefact.file().tensors())
    if (base.weights().contains(view.name)) weights.push_back(view);
  return weights;
}

uint64_t adapter_seed(int64_t seed) { return core::derive_seed(static_cast<uint64_t>(seed), "continual/lora"); }

}  // namespace

void plan_training(TrainSpec& spec, const TaskPlan& plan, const TrainConfig& train, int64_t first, int64_t last,
                   bool local_logits) {
  for (int64_t task = first; task <= last; ++task) spec.tasks.push_back(task);
  spec.logits = local_logits ? plan.stream.tasks[static_cast<size_t>(last)].classes : plan.stream.classes_until(last);
  spec.train = train_identity(train);
  spec.seed = core::derive_seed(static_cast<uint64_t>(plan.seed), fmt::format("continual/task{}", last));
  spec.head_seed = head_seed(plan.seed);
}

std::vector<int64_t> rows_of(const TrainSpec& spec, const data::TaskStream& stream) {
  std::vector<int64_t> rows;
  for (const int64_t task : spec.tasks) {
    const auto& of_task = stream.tasks.at(static_cast<size_t>(task)).train;
    rows.insert(rows.end(), of_task.begin(), of_task.end());
  }
  return rows;
}

Fitted fitted(const core::ArtefactPtr& artefact, const std::optional<adapters::AdapterConfig>& adapter,
              uint64_t adapter_seed, const LearnerSite& site) {
  Fitted out;
  const at::Device device = site.context.device();
  if (adapter) {
    out.model = site.base->shared_on(device);
    out.adapter = artefact ? adapters::Adapter::blank(*adapter, *out.model, adapter_seed, device)
                           : adapters::Adapter::create(*adapter, *out.model, adapter_seed, device);
    if (artefact) load(*artefact, *out.adapter);
    out.adapter->attach(*out.model);
    return out;
  }
  const auto weights = artefact ? weights_in(*artefact, *site.base) : std::vector<core::TensorView>();
  out.model = weights.empty()
                  ? site.base->shared_on(device)
                  : site.base->with_tensors(weights, artefact->file().origin(), artefact)->shared_on(device);
  return out;
}

Trainee Trainee::make(const core::ArtefactPtr& before, const std::optional<adapters::AdapterConfig>& adapter,
                      uint64_t adapter_seed, bool head_only, const LearnerSite& site) {
  Trainee trainee;
  trainee.fitted = continual::fitted(before, adapter, adapter_seed, site);
  if (before) trainee.head = Head::read(*before, site.context.device());
  if (adapter) {
    for (const auto& [name, tensor] : trainee.fitted.adapter->parameters())
      trainee.parameters.emplace_back(kAdapterPrefix + name, tensor);
  } else if (!head_only) {
    trainee.parameters = trainee.fitted.model->make_trainable();
  }
  return trainee;
}

Trainee Trainee::of(const Unit& unit, const TrainSpec& spec, const LearnerSite& site, bool head_only) {
  const auto before = spec.fresh ? nullptr : site.context.artefact(unit.inputs.at(0));
  Trainee trainee = make(before, spec.lora, spec.lora_seed.value_or(0), head_only, site);
  trainee.before = before;
  return trainee;
}

models::NamedTensors Trainee::kept() const { return fitted.adapter ? everything(*fitted.adapter) : parameters; }

core::ArtefactPtr train_tasks(const std::string& kind, const TrainSpec& spec, Trainee& trainee, const LearnerSite& site,
                              const TrainConfig& own, const TrainingHooks& hooks, const Extra& extra) {
  TrainConfig train = train_config(spec.train, own);
  train.steps *= static_cast<int64_t>(spec.tasks.size());
  const ExampleSource& examples = *site.examples;
  models::Backbone& model = *trainee.fitted.model;
  const std::vector<int64_t> rows = rows_of(spec, *site.stream);
  std::map<int64_t, int64_t> target_of;
  for (size_t i = 0; i < spec.logits.size(); ++i) target_of[spec.logits[i]] = static_cast<int64_t>(i);
  auto [weight, bias] = trainee.head.rows(spec.logits, spec.head_seed, model.width(), examples.device());
  weight.set_requires_grad(true);
  bias.set_requires_grad(true);
  TrainJob job{train, trainee.parameters, nullptr, /*tokens_per_sequence=*/1};
  job.parameters.emplace_back(std::string(kHeadPrefix) + "bias", bias);
  job.parameters.emplace_back(std::string(kHeadPrefix) + "weight", weight);
  std::ranges::sort(job.parameters, {}, &std::pair<std::string, at::Tensor>::first);
  if (trainee.fitted.adapter) job.groups = trainee.fitted.adapter->groups();
  for (auto& group : job.groups)
    for (auto& name : group.names) name.insert(0, kAdapterPrefix);

  job.loss = [&, batch_size = train.batch_size](int64_t step, int64_t first, int64_t count) {
    auto batch = data::batch_of(rows, spec.seed, step * batch_size + first, count);
    if (hooks.replayed) {
      const auto replayed = hooks.replayed(step, first, count);
      batch.insert(batch.end(), replayed.begin(), replayed.end());
    }
    std::vector<int64_t> targets = examples.labels("train", batch);
    for (int64_t& label : targets) label = target_of.at(label);
    const models::PassScope scope(model, {.training = true, .step = step, .first = first, .seed = spec.seed});
    const models::Input input = examples.batch("train", batch);
    const at::Tensor scores = at::linear(model.features(input), weight, bias);
    at::Tensor sum = objectives::class_loss(scores, std::move(targets), /*label_smoothing=*/0);
    if (hooks.extra_loss) sum = sum + hooks.extra_loss({input, scores});
    return TrainJob::MicroLoss{sum, scores.size(0)};
  };
  if (hooks.adjust) hooks.adjust(job);
  const TrainOutcome outcome = site.context.train(std::move(job));

  trainee.head.set(spec.logits, weight, bias);
  models::NamedTensors tensors = trainee.kept();
  tensors.insert(tensors.end(), extra.tensors.begin(), extra.tensors.end());
  tensors.emplace_back(std::string(kHeadPrefix) + "bias", trainee.head.bias);
  tensors.emplace_back(std::string(kHeadPrefix) + "weight", trainee.head.weight);
  for (auto& [name, tensor] : tensors) tensor = tensor.detach().cpu();
  core::Json meta = extra.meta;
  meta["classes"] = trainee.head.labels;
  meta["curve"] = curve_json(outcome);
  std::vector<at::Tensor> keep;
  return core::Artefact::create(kind, std::move(meta), models::views_of(tensors, keep));
}

std::optional<std::string> problem_of_trained(const Unit& unit, const core::Artefact& artefact, int64_t width) {
  const auto classes = artefact.meta().at("classes").get<std::vector<int64_t>>();
  for (const int64_t label : unit.spec.at("logits").get<std::vector<int64_t>>())
    if (std::ranges::count(classes, label) != 1) return fmt::format("has no row of its own for class {}", label);
  const auto rows = static_cast<int64_t>(classes.size());
  const auto* weight = artefact.file().find("head.weight");
  const auto* bias = artefact.file().find("head.bias");
  const bool good = weight != nullptr && weight->shape == std::vector<int64_t>{rows, width} && bias != nullptr &&
                    bias->shape == std::vector<int64_t>{rows};
  return good ? std::nullopt : std::optional(fmt::format("has no head of {} rows", rows));
}

void TrainedLearner::describe(const ContinualConfig& config, int64_t seed, EvaluateSpec& spec) const {
  spec.lora = options(config).adapter;
  if (spec.lora && adapters::parametrisation(spec.lora->type).traits().from_seed) spec.lora_seed = adapter_seed(seed);
}

std::unique_ptr<Classifier> TrainedLearner::classifier(const std::vector<core::ArtefactPtr>& state,
                                                       const EvaluateSpec& spec, const LearnerSite& site) const {
  const core::ArtefactPtr artefact = state.empty() ? nullptr : state.front();
  Fitted model = fitted(artefact, spec.lora, spec.lora_seed.value_or(0), site);
  Head head = artefact ? Head::read(*artefact, site.context.device()) : Head{};
  return std::make_unique<HeadClassifier>(std::move(model.model), std::move(head), spec.head_seed.value_or(0));
}

Exportable TrainedLearner::exportable(const std::vector<core::ArtefactPtr>& state, const EvaluateSpec& spec,
                                      const LearnerSite& site) const {
  Fitted of = fitted(state.front(), spec.lora, spec.lora_seed.value_or(0), site);
  const bool changed = !of.adapter && !weights_in(*state.front(), *site.base).empty();
  return {of.adapter ? site.base : std::shared_ptr<const models::Backbone>(std::move(of.model)), std::move(of.adapter),
          Head::read(*state.front(), at::kCPU), !changed};
}

int64_t TrainedLearner::trained_parameters(const ContinualConfig& config, const models::ModelFacts& model) const {
  const auto adapter = options(config).adapter;
  if (!adapter) return model.parameters;
  return adapters::parametrisation(adapter->type).count(adapters::targets_of(*adapter, model.slots), *adapter).trained;
}

void TrainedLearner::check(const ContinualConfig& config, const models::ModelFacts& model) const {
  const auto adapter = options(config).adapter;
  if (!adapter) return;
  (void)adapters::targets_of(*adapter, model.slots);
  if (adapters::parametrisation(adapter->type).wants(*adapter) != adapters::Wants::kNothing)
    throw core::UserError(
        fmt::format(
            "algorithms/continual: an adapter of type {} starts from examples here, which a stream of tasks does "
            "not give it",
            adapter->type),
        "choose another type, init or mask, or method: finetune");
}

TrainConfig TrainedLearner::training(const ContinualConfig& config) const {
  return options(config).train.value_or(config.train);
}

void TrainedLearner::plan_task(TrainSpec& spec, const TaskPlan& plan, int64_t task,
                               const std::vector<std::string>& before, bool local_logits) const {
  plan_training(spec, plan, training(plan.config), task, task, local_logits);
  spec.lora = options(plan.config).adapter;
  if (spec.lora) spec.lora_seed = adapter_seed(plan.seed);
  spec.fresh = before.empty();
}

UnitRequest TrainedLearner::request(const TaskPlan& plan, int64_t task, std::vector<std::string> before) const {
  const TrainConfig train = training(plan.config);
  return {.label = fmt::format("task{}", task),
          .inputs = std::move(before),
          .passes = 3 * static_cast<double>(train.steps * train.batch_size)};
}

}  // namespace moraine::algorithms::continual
