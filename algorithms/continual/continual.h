#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "algorithms/continual/config.h"
#include "algorithms/continual/learner.h"
#include "algorithms/continual/metrics.h"
#include "algorithms/method.h"
#include "algorithms/register.h"

namespace moraine::algorithms::continual {

/// Stands for a cell without an accuracy in the artefact of all matrices; RUN/metrics.h5 has NaN there.
constexpr double kNotEvaluated = -1;

/// Continual learning: several learners on the same class-incremental streams and the same frozen backbone, for every
/// class order and seed of the recipe. After each task the model is evaluated on the test examples of every task,
/// class-incrementally (all classes seen compete) and task-incrementally (the task's own classes compete), out of the
/// same scores.
///
/// A chained learner's unit of task i needs that of task i - 1; evaluations after task i are leaves, so they run on
/// other workers while task i + 1 trains. Seeds: the run's `seed` makes the backbone and draws examples; `seeds` draw
/// initial values and data order.
class Continual final : public Method {
 public:
  explicit Continual(ContinualConfig config);
  /// A recorded run's method; plans and reports, but cannot execute.
  Continual(ContinualConfig config, const core::Json& inputs);

  void open_inputs() override;
  core::Json inputs() const override;
  Plan plan(const RunState& state) const override;
  core::ArtefactPtr execute(const Unit& unit, WorkerContext& context) const override;
  /// Names, shapes and numbers: a result that does not fit fails its attempt.
  void check_result(const Unit& unit, const core::Artefact& artefact) const override;
  std::optional<std::string> missing_result(const RunState& state) const override;
  core::Json summary(const RunState& state) const override;
  void publish(const RunState& state, const std::filesystem::path& run_directory) const override;
  /// `what`: "<learner>/order<order>/seed<seed>", the state after the last task, or with "/task<i>" behind it after
  /// that one; the learner's name is enough where the run has one order and one seed. peft: adapter and head; hf: the
  /// model with its head over the classes seen so far.
  void export_as(const RunState& state, const ExportRequest& request) const override;
  ParameterTable parameters() const override;

 private:
  /// One learner on one stream with one seed.
  struct Track {
    const Learner* learner = nullptr;
    const StreamFacts* stream = nullptr;
    int64_t seed = 0;
    std::optional<std::string> initial;                 // evaluation before the first task
    std::vector<State> states;                          // after task i
    std::vector<std::optional<std::string>> evaluated;  // after task i

    std::string name() const;
  };
  struct Stages {
    std::optional<std::string> backbone;  // "dir:<hash>", "random:<seed>" or an artefact id
    std::vector<Track> tracks;
    std::optional<std::string> matrices;
  };
  enum class Setting { kClassIncremental, kTaskIncremental };

  // plan.cpp
  Stages walk(PlanBuilder& plan) const;
  void walk_track(Track& track, const Stages& stages, PlanBuilder& plan) const;
  std::optional<std::string> ask(const Track& track, int64_t task, const std::string& kind, UnitRequest request,
                                 const TaskPlan::MakeSpec& make, const Stages& stages, PlanBuilder& plan) const;
  std::optional<std::string> train_backbone_unit(PlanBuilder& plan) const;
  SiteSpec site_spec(const Stages& stages, const StreamFacts* stream) const;
  Unit make_unit(const std::string& kind, const std::string& label, core::Json spec, std::vector<std::string> inputs,
                 double cost, const Stages& stages) const;
  double pass_cost() const;  // of one example forward
  double evaluation_cost(const Track& track, int64_t after) const;
  Unit evaluation_unit(const Track& track, int64_t after, const std::vector<std::string>& state,
                       const Stages& stages) const;
  AccuracyMatrix matrix_of(const Track& track, Setting setting, const Stages& stages, const RunState& state) const;
  CellsOffered offered(Setting setting) const;

  // execute.cpp
  core::ArtefactPtr train_backbone(const Unit& unit, WorkerContext& context) const;
  core::ArtefactPtr evaluate(const Unit& unit, const LearnerSite& site) const;
  core::ArtefactPtr collect(const Unit& unit, WorkerContext& context) const;
  std::shared_ptr<const models::Backbone> load_backbone(const SiteSpec& spec, WorkerContext& context) const;
  std::shared_ptr<const ExampleSource> load_images(const std::string& path, const ImagesSpec& spec,
                                                   const std::string& fingerprint, const models::ModelFacts& model,
                                                   WorkerContext& context) const;
  std::shared_ptr<const ExampleSource> load_examples(const SiteSpec& spec, const models::ModelFacts& model,
                                                     WorkerContext& context) const;
  LearnerSite site_of(const Unit& unit, WorkerContext& context) const;

  // export.cpp
  struct Exported;
  Exported find_exported(const Stages& stages, const std::string& what) const;

  // continual.cpp
  std::shared_ptr<const ExampleSource> open_examples() const;
  void open_streams(const ExampleSource& examples, core::Problems& problems);
  void open_backbone_data(core::Problems& problems);
  void check_metrics(core::Problems& problems) const;

  // summary.cpp
  void add_tables(core::Json& out, const Stages& stages, const RunState& state) const;
  void add_pictures(core::Json& out, const Stages& stages, const RunState& state) const;

  ContinualConfig config_;
  models::ModelFacts model_;
  int64_t tokens_ = 1;                 // a backbone passes for one example, in the mean
  std::vector<StreamFacts> streams_;   // by position in config_.orders
  std::vector<int64_t> file_classes_;  // of each task's file, where tasks have files
  std::vector<std::string> class_names_;
  std::string fingerprint_, backbone_fingerprint_, backbone_id_;
};

MethodEntry method_entry();

}  // namespace moraine::algorithms::continual
