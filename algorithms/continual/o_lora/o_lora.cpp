#include "algorithms/continual/o_lora/o_lora.h"

#include <map>
#include <utility>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/matmul.h>

#include "algorithms/continual/config.h"
#include "core/error.h"
#include "core/hash.h"
#include "models/tensor_io.h"

namespace moraine::algorithms::continual {
namespace {

/// One task beside the LoRAs of those before it, which are the inputs.
struct TrainOLoraSpec : TrainSpec {
  static constexpr const char* kKind = "train_o_lora";
  static constexpr int64_t kVersion = 1;
  double strength = 0;
  static const core::Schema<TrainOLoraSpec>& schema() {
    static const auto schema = [] {
      core::Schema<TrainOLoraSpec> s;
      add_train_fields(s);
      s.field("strength", &TrainOLoraSpec::strength);
      return s;
    }();
    return schema;
  }
};

using Parts = std::vector<core::ArtefactPtr>;

// The site with the LoRAs of `parts` in its backbone's weights.
LearnerSite with_parts(const Parts& parts, const adapters::AdapterConfig& adapter, LearnerSite site) {
  const at::NoGradGuard no_grad;
  std::map<std::string, at::Tensor> sums;
  for (const auto& part : parts) {
    const Fitted one = fitted(part, adapter, 0, site);
    for (const auto& [name, delta] : one.adapter->deltas(*one.model)) {
      at::Tensor& sum = sums[name];
      sum = sum.defined() ? sum + delta : delta;
    }
  }
  if (!sums.empty()) site.base = site.base->changed_by({sums.begin(), sums.end()});
  return site;
}

// The factors A, by their names.
models::NamedTensors factors_a(const models::NamedTensors& tensors) {
  models::NamedTensors out;
  for (const auto& [name, tensor] : tensors)
    if (name.ends_with("lora_A.weight")) out.emplace_back(name, tensor);
  return out;
}

core::ArtefactPtr train_o_lora(const Unit& unit, const LearnerSite& site) {
  const auto spec = core::from_spec(TrainOLoraSpec::schema(), unit.spec);
  Parts parts;
  for (size_t i = 0; !spec.fresh && i < static_cast<size_t>(spec.tasks.front()); ++i)
    parts.push_back(site.context.artefact(unit.inputs.at(i)));
  Trainee trainee = Trainee::make(nullptr, spec.lora, spec.lora_seed.value(), /*head_only=*/false,
                                  with_parts(parts, spec.lora.value(), site));
  if (!parts.empty()) trainee.head = Head::read(*parts.back(), site.context.device());
  const models::NamedTensors fresh = factors_a(trainee.parameters);
  models::NamedTensors old;  // all tasks' below one another: |[A_1; A_2; ...] A^T| is the sum
  TrainingHooks hooks;
  if (!parts.empty()) {
    for (const auto& [name, a] : fresh) {
      std::vector<at::Tensor> rows;
      for (const auto& part : parts) rows.push_back(models::copy_of(*part->file().find(name)).to(a.device()));
      old.emplace_back(name, at::cat(rows));
    }
    hooks.extra_loss = [&](const StepBatch& batch) {
      return spec.strength * static_cast<double>(batch.logits.size(0)) * overlap(old, fresh);
    };
  }
  return train_tasks(unit.kind, spec, trainee, site, training_in(site.config.learners.o_lora, site.config.train),
                     hooks);
}

}  // namespace

const core::Schema<OLoraOptions>& o_lora_schema() {
  using C = OLoraOptions;
  static const auto schema =
      core::Schema<C>()
          .object("adapter", &C::adapter, adapters::adapter_schema())
          .doc("The LoRA of one task; of type lora")
          .optional_object("train", &C::train, train_schema())
          .doc("Training on one task; absent = the recipe's train")
          .field("strength", &C::strength)
          .min(0)
          .doc("Weight of the penalty on overlap; higher keeps tasks apart and leaves less room for later ones");
  return schema;
}

at::Tensor overlap(const models::NamedTensors& old, const models::NamedTensors& fresh) {
  MORAINE_CHECK(!old.empty() && old.size() == fresh.size(), "LoRAs of {} and {} modules", old.size(), fresh.size());
  at::Tensor sum;
  for (size_t i = 0; i < old.size(); ++i) {
    const at::Tensor term = at::matmul(old[i].second.detach(), fresh[i].second.t()).abs().sum();
    sum = sum.defined() ? sum + term : term;
  }
  return sum;
}

State OLora::walk_task(TaskPlan& plan, int64_t task, const State& before) const {
  if (!before) return std::nullopt;
  TrainOLoraSpec spec;
  plan_task(spec, plan, task, *before);
  spec.lora_seed = core::derive_seed(static_cast<uint64_t>(plan.seed), fmt::format("continual/o_lora/task{}", task));
  spec.strength = plan.config.learners.o_lora.value_or(OLoraOptions{}).strength;
  const auto id = plan.need(std::move(spec), request(plan, task, *before));
  if (!id) return std::nullopt;
  State after = before;
  after->push_back(*id);
  return after;
}

std::vector<UnitKind> OLora::unit_kinds() const { return {{TrainOLoraSpec::kKind, train_o_lora, problem_of_trained}}; }

std::unique_ptr<Classifier> OLora::classifier(const std::vector<core::ArtefactPtr>& state, const EvaluateSpec& spec,
                                              const LearnerSite& site) const {
  const LearnerSite own = with_parts({state.begin(), state.end() - 1}, spec.lora.value(), site);
  return TrainedLearner::classifier({state.back()}, spec, own);
}

Exportable OLora::exportable(const std::vector<core::ArtefactPtr>& state, const EvaluateSpec& spec,
                             const LearnerSite& site) const {
  const LearnerSite own = with_parts({state.begin(), state.end() - 1}, spec.lora.value(), site);
  Exportable out = TrainedLearner::exportable({state.back()}, spec, own);
  out.on_backbone = state.size() == 1;
  return out;
}

TrainingOptions OLora::options(const ContinualConfig& config) const {
  const OLoraOptions own = config.learners.o_lora.value_or(OLoraOptions{});
  return {own.adapter, own.train};
}

void OLora::check(const ContinualConfig& config, const models::ModelFacts& model) const {
  TrainedLearner::check(config, model);
  const adapters::AdapterConfig adapter = *options(config).adapter;
  if (adapter.type != "lora" || adapters::starts_from_base(adapter))
    throw core::UserError(
        fmt::format("algorithms/continual: o_lora keeps factors A of plain LoRAs apart, not of type {} "
                    "with init {}",
                    adapter.type, adapter.init),
        "set learners.o_lora.adapter to type: lora with init kaiming or gaussian");
}

}  // namespace moraine::algorithms::continual
