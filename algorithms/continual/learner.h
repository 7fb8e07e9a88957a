#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "algorithms/image_source.h"
#include "algorithms/unit.h"
#include "algorithms/worker_context.h"
#include "data/task_stream.h"
#include "models/vit.h"

namespace moraine::algorithms::continual {

struct ContinualConfig;

/// What plans know of a stream: recorded with a run, so that planning and reporting need no data files.
struct StreamFacts {
  struct Task {
    std::vector<int64_t> classes;
    int64_t train = 0, test = 0;  // images
  };
  int64_t order = -1;
  std::string hash;
  std::vector<Task> tasks;

  std::vector<int64_t> classes_until(int64_t last) const;
};

/// One unit a learner asks for; the method adds backbone, threads and the like.
struct UnitRequest {
  std::string label;  // "task3": the run's name is put in front
  core::Json spec;    // what determines the result beside backbone, data and inputs
  std::vector<std::string> inputs;
  double images = 0;  // forward and backward passes, for the predicted cost
};

/// What a learner has on a worker. The stream is null for units that belong to no order.
struct LearnerSite {
  const ContinualConfig& config;
  WorkerContext& context;
  std::shared_ptr<const models::Vit> base;  // frozen, without classifier
  std::shared_ptr<const ImageSource> images;
  std::shared_ptr<const data::TaskStream> stream;
  const core::Json& spec;  // of the unit: what it says counts, not `config`
};

/// Scores of classes for images; what an evaluation runs.
class Classifier {
 public:
  virtual ~Classifier() = default;
  virtual bool knows(int64_t label) const = 0;
  /// [B, labels] for images [B, C, H, W] of the backbone's size; every label must be known.
  virtual at::Tensor scores(const at::Tensor& images, std::span<const int64_t> labels) = 0;
};

/// A continual method: which units make its state after each task, how a worker runs them, and what the state predicts.
/// The state after a task is a list of artefacts. Pure and thread-safe.
class Learner {
 public:
  virtual ~Learner() = default;
  virtual std::string name() const = 0;   // in recipes
  virtual std::string title() const = 0;  // one line, for tables' notes
  /// Kind of its units and its state. Learners that share one share unit results where everything else is equal.
  virtual std::string kind() const = 0;
  /// Part of its units' specifications; raised when a change of the code changes results for the same one.
  virtual int64_t result_version() const { return 1; }
  /// Whether units() of a task waits for the state after the task before it.
  virtual bool chained() const = 0;
  /// Whether the state after a task keeps the artefacts of the tasks before it.
  virtual bool accumulates() const { return false; }
  /// Units of `task`, with `before` the state after the previous task (empty before the first, or when not chained()).
  virtual std::vector<UnitRequest> units(const ContinualConfig& config, const StreamFacts& stream, int64_t task,
                                         int64_t seed, const std::vector<std::string>& before) const = 0;
  virtual core::ArtefactPtr execute(const Unit& unit, const LearnerSite& site) const = 0;
  /// What a state predicts; `head_seed` draws the rows of classes that were never trained.
  virtual std::unique_ptr<Classifier> classifier(const std::vector<core::ArtefactPtr>& state, uint64_t head_seed,
                                                 const LearnerSite& site) const = 0;
  /// Numbers trained on one task, without the head.
  virtual int64_t trained_parameters(const ContinualConfig& config, const models::Vit& base) const = 0;
};

/// All learners in the order of tables: upper bound first, then as the folders stand.
const std::vector<const Learner*>& learners();
const Learner& find_learner(const std::string& name);
/// The first learner of a kind, for executing and evaluating.
const Learner& learner_of_kind(const std::string& kind);
std::vector<std::string> learner_names();

/// Seed of initial head rows of a run.
uint64_t head_seed(int64_t seed);

}  // namespace moraine::algorithms::continual
