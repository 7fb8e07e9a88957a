#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "algorithms/adapters/adapter.h"
#include "algorithms/adapters/config.h"
#include "algorithms/continual/head.h"
#include "algorithms/continual/learner.h"

namespace moraine::algorithms::continual {

/// Options of learners that train a model on tasks.
struct TrainingOptions {
  std::optional<adapters::AdapterConfig> adapter = {};  // absent = all weights
  std::optional<TrainConfig> train = {};                // of one task; absent = the recipe's
};
template <typename C>
core::Schema<C>& add_training_options(core::Schema<C>& schema) {
  return schema.template optional_object<adapters::AdapterConfig>("adapter", &C::adapter, adapters::adapter_schema())
      .doc("What is trained beside the frozen backbone; absent = all its weights")
      .template optional_object<TrainConfig>("train", &C::train, train_schema())
      .doc("Training on one task; absent = the recipe's train");
}
/// The training that such options say, or the recipe's.
template <typename Options>
const TrainConfig& training_in(const std::optional<Options>& options, const TrainConfig& recipe) {
  return options && options->train ? *options->train : recipe;
}

/// What every unit says that trains on tasks.
struct TrainSpec : SiteSpec {
  std::vector<int64_t> tasks, logits;  // trained on; classes that compete
  core::Json train = {};               // train_identity()
  uint64_t seed = 0, head_seed = 0;    // of data order and passes; of new head rows
  bool fresh = true;                   // starts from the backbone, not from a state
  std::optional<adapters::AdapterConfig> lora = {};
  std::optional<uint64_t> lora_seed = {};
};
template <typename C>
void add_train_fields(core::Schema<C>& schema) {
  add_site_fields(schema);
  schema.template field<std::vector<int64_t>>("tasks", &C::tasks)
      .template field<std::vector<int64_t>>("logits", &C::logits)
      .template field<core::Json>("train", &C::train)
      .template field<uint64_t>("seed", &C::seed)
      .template field<uint64_t>("head_seed", &C::head_seed)
      .template field<bool>("fresh", &C::fresh)
      .template optional_object<adapters::AdapterConfig>("lora", &C::lora, adapters::adapter_schema())
      .joined_later()
      .template field<std::optional<uint64_t>>("lora_seed", &C::lora_seed)
      .joined_later();
}
/// The table of a specification that adds nothing to TrainSpec.
template <typename C>
const core::Schema<C>& plain_train_schema() {
  static const auto schema = [] {
    core::Schema<C> s;
    add_train_fields(s);
    return s;
  }();
  return schema;
}

/// Tasks `first` .. `last` on logits of all classes until `last`, or of task `last` alone.
void plan_training(TrainSpec& spec, const TaskPlan& plan, const TrainConfig& train, int64_t first, int64_t last,
                   bool local_logits);
/// Training rows of the unit's tasks.
std::vector<int64_t> rows_of(const TrainSpec& spec, const data::TaskStream& stream);
/// A backbone as an artefact left it: all its weights, or an adapter on it, or the backbone itself where the artefact
/// has neither (or is none).
struct Fitted {
  std::unique_ptr<models::Backbone> model;
  std::optional<adapters::Adapter> adapter;
};
Fitted fitted(const core::ArtefactPtr& artefact, const std::optional<adapters::AdapterConfig>& adapter,
              uint64_t adapter_seed, const LearnerSite& site);

/// A micro-batch in a step's loss.
struct StepBatch {
  const models::Input& input;
  const at::Tensor& logits;  // [rows, spec.logits]
};

/// What a learner adds to training on a task. Everything drawn in it is a function of seeds and step, so that a resumed
/// run keeps its bits.
struct TrainingHooks {
  /// Rows of split "train" that join a micro-batch's own `count`: those of a buffer.
  std::function<std::vector<int64_t>(int64_t step, int64_t first, int64_t count)> replayed = nullptr;
  /// Added to the summed cross entropy of a micro-batch, so in proportion to its rows.
  std::function<at::Tensor(const StepBatch&)> extra_loss = nullptr;
  /// Sees the job before it runs: groups, state, calls before a step and after its update, update space.
  std::function<void(TrainJob&)> adjust = nullptr;
};

/// A state as other tools can hold it: a model, an adapter on it or none, and a head over classes.
struct Exportable {
  std::shared_ptr<const models::Backbone> model;  // with all that the adapter does not say in its weights
  std::optional<adapters::Adapter> adapter;
  Head head;
  bool on_backbone = true;  // the model is the run's backbone, so adapter and head say it all
};

/// What a unit trains: a model, by its adapter, all its weights or (neither) its head alone, and the head.
struct Trainee {
  /// As `before` left it, or fresh: an adapter, or without one all weights, or with `head_only` neither.
  static Trainee make(const core::ArtefactPtr& before, const std::optional<adapters::AdapterConfig>& adapter,
                      uint64_t adapter_seed, bool head_only, const LearnerSite& site);

  /// As the unit's first input left it, which is `before`; fresh where the unit says so.
  static Trainee of(const Unit& unit, const TrainSpec& spec, const LearnerSite& site, bool head_only = false);

  core::ArtefactPtr before = nullptr;
  Fitted fitted;
  models::NamedTensors parameters;  // trained, by their names in artefacts, without the head
  Head head;

  /// By names in artefacts: what is kept beside the head.
  models::NamedTensors kept() const;
};

/// More of an artefact.
struct Extra {
  core::Json meta = core::Json::object();
  models::NamedTensors tensors = {};
};

/// Trains `trainee` and the head rows of spec.logits by cross entropy over these logits on the training examples of
/// spec.tasks, `steps` for each of the tasks. The batch of a step is a pure function of (seed, step). Gives the
/// artefact of kind `kind`: what is kept, the head of every class seen, the curve, and `extra`. `own` says how often
/// this worker saves and logs.
core::ArtefactPtr train_tasks(const std::string& kind, const TrainSpec& spec, Trainee& trainee, const LearnerSite& site,
                              const TrainConfig& own, const TrainingHooks& hooks = {}, const Extra& extra = {});

/// Names and shapes of what train_tasks() gives.
std::optional<std::string> problem_of_trained(const Unit& unit, const core::Artefact& artefact, int64_t width);

/// Learners whose state's first artefact is what train_tasks() gave: what they share.
class TrainedLearner : public Learner {
 public:
  virtual TrainingOptions options(const ContinualConfig& config) const = 0;
  std::string state_kind() const override { return unit_kinds().front().name; }
  void describe(const ContinualConfig& config, int64_t seed, EvaluateSpec& spec) const override;
  std::unique_ptr<Classifier> classifier(const std::vector<core::ArtefactPtr>& state, const EvaluateSpec& spec,
                                         const LearnerSite& site) const override;
  Exportable exportable(const std::vector<core::ArtefactPtr>& state, const EvaluateSpec& spec,
                        const LearnerSite& site) const override;
  int64_t trained_parameters(const ContinualConfig& config, const models::ModelFacts& model) const override;
  void check(const ContinualConfig& config, const models::ModelFacts& model) const override;

 protected:
  TrainConfig training(const ContinualConfig& config) const;
  /// Fills what `spec` says of training on one task, after `before`.
  void plan_task(TrainSpec& spec, const TaskPlan& plan, int64_t task, const std::vector<std::string>& before,
                 bool local_logits = false) const;
  UnitRequest request(const TaskPlan& plan, int64_t task, std::vector<std::string> before) const;
  /// A walk of one unit a task, whose artefact is the state; `cost` relative to training all weights on new examples.
  template <typename Spec>
  State after_training(TaskPlan& plan, int64_t task, const State& before, Spec spec = {}, bool local_logits = false,
                       double cost = 1) const {
    if (!before) return std::nullopt;
    plan_task(spec, plan, task, *before, local_logits);
    UnitRequest unit = request(plan, task, *before);
    unit.passes *= cost;
    const auto id = plan.need(std::move(spec), std::move(unit));
    return id ? State({*id}) : std::nullopt;
  }
};

}  // namespace moraine::algorithms::continual
