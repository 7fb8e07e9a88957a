// What workers do. Of the recipe it reads paths alone; what is computed is in the unit.
#include <algorithm>

#include <ATen/core/grad_mode.h>

#include "algorithms/adapters/adapter.h"
#include "algorithms/evaluate.h"
#include "algorithms/finetune/finetune.h"
#include "core/error.h"
#include "models/decoder.h"
#include "models/tensor_io.h"

namespace moraine::algorithms::finetune {
namespace {

constexpr const char* kWeights = "weights";  // kind of an artefact that holds all weights of a model

at::ScalarType type_of(const std::string& dtype) { return dtype == "bfloat16" ? at::kBFloat16 : at::kFloat; }

}  // namespace

std::shared_ptr<models::Decoder> Finetune::load_base(const std::string& base, const std::string& dtype,
                                                     WorkerContext& context) const {
  return cached_model(config_.model.path, base, model_id_, type_of(dtype), context);
}

std::shared_ptr<data::TextDataset> Finetune::load_text(const TextSpec& spec, WorkerContext& context) const {
  const auto task =
      std::ranges::find_if(config_.tasks, [&](const TaskConfig& candidate) { return candidate.name == spec.name; });
  if (task == config_.tasks.end())
    throw core::UserError(fmt::format("algorithms/finetune: this site's recipe has no task '{}'", spec.name),
                          "give every process the same recipe");
  return cached_dataset(task->path, core::to_spec(text_schema(), spec), context);
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

core::ArtefactPtr Finetune::train(const Unit& unit, WorkerContext& context) const {
  const auto spec = core::from_spec(TrainSpec::schema(), unit.spec);
  const TrainConfig train = train_config(spec.train, config_.train);
  models::Decoder model = load_base(spec.base, train.dtype, context)->share();
  const auto text = load_text(spec.data, context);
  TrainJob job{
      train, {}, language_model_loss(model, text, spec.data_seed, train.batch_size, context.device()), text->seq_len()};
  std::optional<adapters::Adapter> adapter;
  if (spec.adapter) {
    adapter = spec.start.empty()
                  ? adapters::Adapter::create(*spec.adapter, model, spec.adapter_seed, context.device(),
                                              adapters::calibration_of(model, job.loss, train))
                  : adapters::Adapter::load(start_directory(spec.start), model, at::kFloat, context.device());
    adapter->attach(model);
    job.parameters = adapter->parameters();
    job.groups = adapter->groups();
  } else {
    job.parameters = model.make_trainable();
    if (spec.galore) job.space = galore::make_space(*spec.galore, model.slots(), job.parameters);
  }
  const TrainOutcome outcome = context.train(std::move(job));
  core::Json meta = {{"base", spec.base}, {"task", spec.data.name}, {"curve", curve_json(outcome)}};
  if (adapter) return adapter->to_artefact(std::move(meta), spec.adapter_seed);
  models::NamedTensors weights;
  for (const auto& [name, tensor] : model.weights()) weights.emplace_back(name, tensor.detach().cpu());
  std::vector<at::Tensor> keep;
  return core::Artefact::create(kWeights, std::move(meta), models::views_of(weights, keep));
}

core::ArtefactPtr Finetune::evaluate_unit(const Unit& unit, WorkerContext& context) const {
  const auto spec = core::from_spec(EvaluateSpec::schema(), unit.spec);
  const auto text = load_text(spec.data, context);
  const auto base = load_base(spec.base, spec.dtype, context);
  const auto result = unit.inputs.empty() ? core::ArtefactPtr() : context.artefact(unit.inputs.at(0));
  const bool all_weights = result && result->kind() == kWeights;
  models::Decoder model = all_weights
                              ? models::Decoder::from_tensors(base->config(), result->file().tensors(),
                                                              result->file().origin(), type_of(spec.dtype), result)
                                    .on(context.device())
                              : base->share();
  if (result && !all_weights) adapters::Adapter::from_artefact(*result, model, context.device()).attach(model);
  const Evaluation sums = evaluate(model, *text, spec.sequences, spec.batch_size, context);
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
    if (artefact.kind() != (spec.adapter ? "adapter" : kWeights))
      refuse(fmt::format("is of kind '{}'", artefact.kind()));
    if (artefact.meta().at("base") != spec.base || artefact.meta().at("task") != spec.data.name)
      refuse("was trained against another model or on another task");
    int64_t numbers = 0;
    for (const auto& tensor : artefact.file().tensors()) numbers += tensor.numel();
    const int64_t planned = counts(spec.adapter, !spec.start.empty()).stored;
    if (numbers != planned) refuse(fmt::format("holds {} numbers, planned are {}", numbers, planned));
  } catch (const core::Json::exception& error) {
    refuse(fmt::format("is malformed: {}", error.what()));
  }
}

}  // namespace moraine::algorithms::finetune
