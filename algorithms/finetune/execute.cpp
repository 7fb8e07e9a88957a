// What workers do. Of the recipe it reads paths alone; what is computed is in the unit.
#include <algorithm>

#include <ATen/core/grad_mode.h>

#include "algorithms/adapters/adapter.h"
#include "algorithms/finetune/finetune.h"
#include "algorithms/language_model.h"
#include "core/error.h"
#include "models/tensor_io.h"

namespace moraine::algorithms::finetune {
namespace {

at::ScalarType scalar_type(const std::string& dtype) { return dtype == "bfloat16" ? at::kBFloat16 : at::kFloat; }

/// A unit's context for what is done within a step of training, whose progress is that of the training: a stop waits
/// for the step's end, so that it finds a checkpoint.
class WithinStep final : public WorkerContext {
 public:
  explicit WithinStep(WorkerContext& outer) : outer_(outer) {}
  core::ArtefactPtr artefact(const std::string& id) override { return outer_.artefact(id); }
  TrainOutcome train(TrainJob) override { throw core::InternalError("a training within a step of another"); }
  void metric(const std::string& key, int64_t step, double value) override { outer_.metric(key, step, value); }
  void progress(double, double) override {}
  at::Device device() const override { return outer_.device(); }
  std::shared_ptr<void> cached(const std::string& key, const std::function<std::shared_ptr<void>()>& make) override {
    return outer_.cached(key, make);
  }

 private:
  WorkerContext& outer_;
};

/// The adapter that a training begins with; nullopt where no adapter is trained.
std::optional<adapters::Adapter> first_adapter(const TrainSpec& spec,
                                               const std::optional<adapters::PeftDirectory>& start,
                                               models::Backbone& model, const TrainJob& job,
                                               const WorkerContext& context) {
  if (!spec.adapter) return std::nullopt;
  if (start) return adapters::Adapter::load(*start, model, at::kFloat, context.device());
  return adapters::Adapter::create(*spec.adapter, model, spec.adapter_seed, context.device(),
                                   adapters::calibration_of(model, job.loss, job.config));
}

/// The artefact of what was trained.
core::ArtefactPtr result_of(const TrainSpec& spec, core::Json meta, const std::optional<adapters::Adapter>& adapter,
                            const objectives::Head& head, const models::Backbone& model) {
  models::NamedTensors tensors;
  for (const auto& [name, tensor] : head.tensors()) tensors.emplace_back(name, tensor.detach().cpu());
  if (adapter) return adapter->to_artefact(std::move(meta), spec.adapter_seed, std::move(tensors));
  if (!spec.head_only)
    for (const auto& [name, tensor] : model.weights()) tensors.emplace_back(name, tensor.detach().cpu());
  std::ranges::sort(tensors, {}, &std::pair<std::string, at::Tensor>::first);
  std::vector<at::Tensor> keep;
  return core::Artefact::create(spec.head_only ? kHead : kWeights, std::move(meta), models::views_of(tensors, keep));
}

}  // namespace

std::shared_ptr<models::Backbone> Finetune::load_base(const std::string& base, const std::string& dtype,
                                                      WorkerContext& context) const {
  const auto make = [&]() -> std::shared_ptr<void> {
    if (base != model_id_)
      throw core::UserError(
          fmt::format("algorithms/finetune: the model in {} differs from the coordinator's", config_.model.path),
          "every site must use a byte-identical model");
    return models::open_backbone(config_.model.path, scalar_type(dtype), config_.model.size())
        ->shared_on(context.device());
  };
  return std::static_pointer_cast<models::Backbone>(context.cached(fmt::format("backbone/{}/{}", dtype, base), make));
}

std::shared_ptr<const objectives::Objective> Finetune::load_objective(const objectives::DataSpec& spec,
                                                                      WorkerContext& context) const {
  const auto task =
      std::ranges::find_if(config_.tasks, [&](const TaskConfig& candidate) { return candidate.name == spec.name; });
  if (task == config_.tasks.end())
    throw core::UserError(fmt::format("algorithms/finetune: this site's recipe has no task '{}'", spec.name),
                          "give every process the same recipe");
  return objectives::open_objective(task->path, spec, *facts_, context);
}

std::unique_ptr<models::Backbone> fitted(const models::Backbone& base, const core::ArtefactPtr& result) {
  if (!result || result->kind() != kWeights) return base.shared_on(base.device());
  std::vector<core::TensorView> weights = result->file().tensors();
  std::erase_if(weights,
                [](const core::TensorView& tensor) { return tensor.name.starts_with(objectives::Head::kPrefix); });
  return base.with_tensors(weights, result->file().origin(), result)->shared_on(base.device());
}

core::ArtefactPtr Finetune::execute(const Unit& unit, WorkerContext& context) const {
  if (unit.kind == TrainSpec::kKind) return train(unit, context);
  MORAINE_CHECK(unit.kind == EvaluateSpec::kKind, "finetune has no unit kind '{}'", unit.kind);
  const at::NoGradGuard no_grad;
  return evaluate_unit(unit, context);
}

std::filesystem::path Finetune::start_directory(const std::string& hash) const {
  for (const auto& entry : config_.adapters)
    if (const auto start = started_.find(entry.name); start != started_.end() && start->second.hash == hash)
      return entry.start;
  throw core::UserError("algorithms/finetune: this site has another adapter to start from than the coordinator",
                        "every site needs the same files at adapters.<i>.start");
}

std::shared_ptr<EarlyStopping> Finetune::early_stopping(const TrainSpec& spec, const TrainConfig& train,
                                                        const models::NamedTensors& parameters, models::Backbone& model,
                                                        const objectives::Head& head, WorkerContext& context) const {
  if (!spec.early_stopping) return nullptr;
  const auto held_out = load_objective(*spec.validation, context);
  const int64_t rows_at_once = train.micro_batch_size > 0 ? train.micro_batch_size : train.batch_size;
  return std::make_shared<EarlyStopping>(
      *spec.early_stopping, train.steps, objectives::metric_of(spec.data.objective), parameters,
      [&model, &head, &context, held_out, rows_at_once](const ScoredRows& rows) {
        WithinStep within(context);
        return held_out->score(model, head, rows, rows_at_once, within);
      },
      [&context](int64_t step, double score) { context.metric("validation_score", step, score); });
}

core::ArtefactPtr Finetune::train(const Unit& unit, WorkerContext& context) const {
  const auto spec = core::from_spec(TrainSpec::schema(), unit.spec);
  const TrainConfig train = train_config(spec.train, config_.train);
  const auto model = load_base(spec.base, train.dtype, context)->shared_on(context.device());
  const auto objective = load_objective(spec.data, context);
  std::optional<adapters::PeftDirectory> start;
  if (!spec.start.empty()) {
    start = adapters::read_peft_directory(start_directory(spec.start), &facts_->classifier);
    if (start->hash() != spec.start)
      throw core::UserError(fmt::format("algorithms/finetune: {} changed since the run was planned",
                                        start_directory(spec.start).string()),
                            "start the run again: a new plan takes the new files");
  }
  const auto head = start && !start->classifier.empty()
                        ? objectives::Head::start(start->classifier, context.device())
                        : objectives::Head::fresh(spec.data.classes, *facts_, spec.adapter_seed, context.device());
  TrainJob job{train, {}, nullptr, objective->tokens_per_row()};
  job.update_in_backward = config_.update_in_backward;
  job.loss = [&](int64_t step, int64_t first, int64_t count) {
    const models::PassScope scope(*model, {.training = true,
                                           .step = step,
                                           .first = first,
                                           .seed = spec.data_seed,
                                           .recompute = config_.gradient_checkpointing});
    return objective->loss(*model, head, {spec.data_seed, step * train.batch_size + first, count});
  };
  const auto adapter = first_adapter(spec, start, *model, job, context);
  if (adapter) {
    adapter->attach(*model);
    job.parameters = adapter->parameters();
    job.groups = adapter->groups();
  } else if (!spec.head_only) {
    job.parameters = model->make_trainable();
    if (spec.galore) job.space = galore::make_space(*spec.galore, model->slots(), job.parameters);
  }
  for (auto& entry : head.tensors()) job.parameters.push_back(std::move(entry));
  std::ranges::sort(job.parameters, {}, &std::pair<std::string, at::Tensor>::first);
  const auto stopping = early_stopping(spec, train, job.parameters, *model, head, context);
  if (stopping) job.state = stopping->state(), job.validation = stopping;
  const TrainOutcome outcome = context.train(std::move(job));
  if (stopping) stopping->restore();
  core::Json meta = {{"base", spec.base}, {"task", spec.data.name}, {"curve", curve_json(outcome)}};
  if (stopping) meta["early_stopping"] = stopping->record().to_json();
  return result_of(spec, std::move(meta), adapter, head, *model);
}

core::ArtefactPtr Finetune::evaluate_unit(const Unit& unit, WorkerContext& context) const {
  const auto spec = core::from_spec(EvaluateSpec::schema(), unit.spec);
  const auto objective = load_objective(spec.data, context);
  const auto base = load_base(spec.base, spec.dtype, context);
  const auto result = unit.inputs.empty() ? core::ArtefactPtr() : context.artefact(unit.inputs.at(0));
  const auto model = fitted(*base, result);
  if (result && result->kind() == kAdapter) {
    const auto adapter = adapters::Adapter::from_artefact(*result, *model, context.device());
    (spec.rank > 0 ? adapter.truncated(spec.rank, *model) : adapter).attach(*model);
  }
  const auto head = result ? objectives::Head::read(*result, context.device()) : objectives::Head();
  const Evaluation sums = objective->score(*model, head, spec.sequences, spec.batch_size, context);
  return core::Artefact::create("evaluation", {{"result", sums.to_json()}}, {});
}

void Finetune::check_result(const Unit& unit, const core::Artefact& artefact) const {
  const auto refuse = [&](const std::string& what) {
    throw core::UserError(fmt::format("algorithms/finetune: the result of {} {}", unit.label, what),
                          "the worker runs other code or was given another unit: look at its log");
  };
  try {
    if (unit.kind == EvaluateSpec::kKind) {
      if (artefact.kind() != "evaluation") refuse(fmt::format("is of kind '{}'", artefact.kind()));
      if (const auto why = Evaluation::from_json(artefact.meta().at("result")).impossible()) refuse(*why);
      return;
    }
    const auto spec = core::from_spec(TrainSpec::schema(), unit.spec);
    if (artefact.kind() != (spec.adapter ? kAdapter : spec.head_only ? kHead : kWeights))
      refuse(fmt::format("is of kind '{}'", artefact.kind()));
    if (artefact.meta().at("base") != spec.base || artefact.meta().at("task") != spec.data.name)
      refuse("was trained against another model or on another task");
    if (spec.early_stopping) {
      const auto record = StoppingRecord::from_json(artefact.meta().at("early_stopping"));
      if (const auto why = record.impossible(spec.train.at("steps").get<int64_t>())) refuse(*why);
    }
    int64_t numbers = 0;
    for (const auto& tensor : artefact.file().tensors()) numbers += tensor.numel();
    const int64_t planned = (spec.head_only ? 0 : counts(spec.adapter, !spec.start.empty()).stored) +
                            objectives::Head::count(spec.data.classes, *facts_);
    if (numbers != planned) refuse(fmt::format("holds {} numbers, planned are {}", numbers, planned));
  } catch (const core::Json::exception& error) {
    refuse(fmt::format("is malformed: {}", error.what()));
  }
}

}  // namespace moraine::algorithms::finetune
