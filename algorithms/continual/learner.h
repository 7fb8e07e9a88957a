#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

#include "algorithms/continual/examples.h"
#include "algorithms/continual/units.h"
#include "algorithms/unit.h"
#include "algorithms/worker_context.h"
#include "data/task_stream.h"
#include "models/open_backbone.h"

// The seam that a continual method plugs into: one folder with a Learner, its options and the kinds of units it asks
// for; a line in learner.cpp and, if it has options, two in learners_config. It then runs on images and texts, on every
// backbone, for every order and seed, beside all others.
namespace moraine::algorithms::continual {

struct ContinualConfig;

/// What plans know of a stream: recorded with a run, so that planning and reporting need no data files.
struct StreamFacts {
  struct Task {
    std::vector<int64_t> classes;
    int64_t train = 0, test = 0;  // examples
  };
  int64_t order = -1;
  std::string hash;
  std::vector<Task> tasks;

  std::vector<int64_t> classes_until(int64_t last) const;
};

/// Artefacts that a model after a task is made of; nullopt = not all of them are there yet.
using State = std::optional<std::vector<std::string>>;

/// One unit a learner asks for, beside its specification.
struct UnitRequest {
  std::string label;  // "task3": the run's name is put in front
  std::vector<std::string> inputs = {};
  double passes = 0;   // of one example forward, for the predicted cost; backward counts two
  bool of_run = true;  // false: belongs to no order and no seed, all runs of a recipe share it
};

/// What a learner walks through one task with: facts, and units to need.
class TaskPlan {
 public:
  using MakeSpec = std::function<core::Json(SiteSpec)>;
  using Ask = std::function<std::optional<std::string>(const std::string& kind, UnitRequest, const MakeSpec&)>;
  TaskPlan(const ContinualConfig& of, const StreamFacts& facts, int64_t run_seed, Ask ask)
      : config(of), stream(facts), seed(run_seed), ask_(std::move(ask)) {}

  const ContinualConfig& config;
  const StreamFacts& stream;
  const int64_t seed;  // of the run: of initial values and data order

  /// The artefact of a finished unit, or nullopt, and the unit is pending. The walk fills what is SiteSpec's of `spec`.
  template <typename Spec>
  std::optional<std::string> need(Spec spec, UnitRequest request) {
    return ask_(Spec::kKind, std::move(request), [&spec](SiteSpec site) {
      static_cast<SiteSpec&>(spec) = std::move(site);
      spec.version = Spec::kVersion;
      return core::to_spec(Spec::schema(), spec);
    });
  }

 private:
  Ask ask_;
};

/// What a learner has on a worker. Without backbone and examples for units that merge; without stream for those of no
/// order.
struct LearnerSite {
  const ContinualConfig& config;  // how often this worker saves and logs; everything else says the unit
  WorkerContext& context;
  std::shared_ptr<const models::Backbone> base;  // frozen
  std::shared_ptr<const ExampleSource> examples;
  std::shared_ptr<const data::TaskStream> stream;
};

/// A kind of unit: what a worker does with one, and whether an artefact can be its result.
struct UnitKind {
  std::string name;  // Spec::kKind
  core::ArtefactPtr (*execute)(const Unit&, const LearnerSite&) = nullptr;
  /// What is wrong with names and shapes; numbers are checked for all. `width` is that of the backbone's features.
  std::optional<std::string> (*problem)(const Unit&, const core::Artefact&, int64_t width) = nullptr;
  bool merges = false;  // reads artefacts alone: runs on the coordinator, without examples and backbone
};

/// A state as other tools can hold it (training.h).
struct Exportable;

/// Scores of classes for examples; what an evaluation runs.
class Classifier {
 public:
  virtual ~Classifier() = default;
  virtual bool knows(int64_t label) const = 0;
  /// Whether scores() differ when the examples' task is told; they are computed for both settings then.
  virtual bool uses_task() const { return false; }
  /// [B, labels]; every label must be known. `task` of all examples, where the setting tells it.
  virtual at::Tensor scores(const models::Input& batch, std::span<const int64_t> labels,
                            std::optional<int64_t> task) = 0;
};

/// A continual method: which units make its state after each task, how a worker runs them, and what the state predicts.
/// Pure and thread-safe.
class Learner {
 public:
  virtual ~Learner() = default;
  virtual std::string name() const = 0;   // in recipes
  virtual std::string title() const = 0;  // one line, for tables' notes
  /// The state after `task`, from the one after the task before it (no artefact before the first). Asks for whatever
  /// can run already.
  virtual State walk_task(TaskPlan& plan, int64_t task, const State& before) const = 0;
  /// Kinds of the units that walk_task() asks for. Learners that share a kind share its functions.
  virtual std::vector<UnitKind> unit_kinds() const = 0;
  /// What reads its states: classifier() of the first learner that says the same. Learners that share it share results
  /// where everything else is equal.
  virtual std::string state_kind() const = 0;
  /// How many artefacts of a state, from the first on, classifier() reads.
  virtual size_t parts_scored(size_t parts) const { return parts; }
  /// Adds what classifier() needs beside the state.
  virtual void describe(const ContinualConfig&, int64_t /*seed*/, EvaluateSpec&) const {}
  virtual std::unique_ptr<Classifier> classifier(const std::vector<core::ArtefactPtr>& state, const EvaluateSpec& spec,
                                                 const LearnerSite& site) const = 0;
  /// The state for other tools. Throws UserError if it is nothing they know, as by default. `site` has the backbone
  /// alone.
  virtual Exportable exportable(const std::vector<core::ArtefactPtr>& state, const EvaluateSpec& spec,
                                const LearnerSite& site) const;
  /// Forward passes of the backbone that one example's scores take after `tasks` tasks.
  virtual int64_t forward_passes(const ContinualConfig&, int64_t /*tasks*/) const { return 1; }
  /// Whether a task's training starts from the state before it. For predicted costs and curves alone.
  virtual bool chained() const { return true; }
  /// Whether it has a head with initial rows, and so scores for classes that were never trained, and before all tasks.
  virtual bool has_head() const { return true; }
  /// Numbers trained on one task, without the head.
  virtual int64_t trained_parameters(const ContinualConfig& config, const models::ModelFacts& model) const = 0;
  /// Numbers a worker sends for one task, without what every class adds.
  virtual int64_t numbers_sent(const ContinualConfig& config, const models::ModelFacts& model) const {
    return trained_parameters(config, model);
  }
  /// Numbers that a worker sends for one class.
  virtual int64_t numbers_per_class(const ContinualConfig&, const models::ModelFacts& model) const {
    return model.width + 1;
  }
  /// Throws UserError if its options do not fit the model.
  virtual void check(const ContinualConfig&, const models::ModelFacts&) const {}
};

/// All learners in the order of tables: upper bound first.
const std::vector<const Learner*>& learners();
const Learner& find_learner(const std::string& name);
/// The first of a kind of states.
const Learner& learner_of_state(const std::string& kind);
/// The kind of a unit that some learner asks for.
const UnitKind& find_unit_kind(const std::string& name);
std::vector<std::string> learner_names();

/// Seed of initial head rows of a run.
uint64_t head_seed(int64_t seed);

}  // namespace moraine::algorithms::continual
