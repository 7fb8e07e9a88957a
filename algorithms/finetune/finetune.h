#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "algorithms/adapters/parametrisation.h"
#include "algorithms/finetune/config.h"
#include "algorithms/finetune/units.h"
#include "algorithms/method.h"
#include "algorithms/objectives/objective.h"
#include "algorithms/register.h"
#include "models/open_backbone.h"

namespace moraine::algorithms::finetune {

/// Fits one model of any family to tasks of any objective, by adapters of any type, by all its weights or by a head
/// alone: every adapter with every task and seed, one unit each, so they spread over workers. All of one task and seed
/// see the same batches in the same order.
///
/// Trained: what the adapter's parametrisation says, and a head where the task needs one. A worker sends these, or all
/// weights where there is no adapter.
class Finetune final : public Method {
 public:
  explicit Finetune(FinetuneConfig config);
  /// A recorded run's method; plans and reports, but cannot execute.
  Finetune(FinetuneConfig config, const core::Json& inputs);

  void open_inputs() override;
  core::Json inputs() const override;
  Plan plan(const RunState& state) const override;
  core::ArtefactPtr execute(const Unit& unit, WorkerContext& context) const override;
  void check_result(const Unit& unit, const core::Artefact& artefact) const override;
  std::optional<std::string> missing_result(const RunState& state) const override;
  core::Json summary(const RunState& state) const override;
  /// RUN/adapters/<adapter>/<task>/seed<seed>: PEFT directories of the types that PEFT knows.
  void publish(const RunState& state, const std::filesystem::path& run_directory) const override;
  /// `what`: "<adapter>/<task>/seed<seed>". peft, or hf: the merged model.
  void export_as(const RunState& state, const ExportRequest& request) const override;
  ParameterTable parameters() const override;

 private:
  /// An adapter that a recipe's entry starts from.
  struct Started {
    adapters::AdapterConfig config;
    std::string hash;     // of its files
    int64_t classes = 0;  // of the head beside it; 0 = none
  };
  /// One result: an adapter, a task and a seed.
  struct Result {
    const EntryConfig* entry = nullptr;
    const TaskConfig* task = nullptr;
    int64_t seed = 0;
    std::optional<std::string> artefact;
    std::map<std::string, std::string> tests;  // by task: evaluation
    std::map<int64_t, std::string> at_ranks;   // of its own task, by rank: evaluation

    std::string name() const;
  };
  struct Stages {
    std::map<std::string, std::string> base;  // by task: evaluation
    std::vector<Result> results;              // adapters, then tasks, then seeds, as in the recipe
    bool complete = true;
  };
  Stages walk(PlanBuilder& plan) const;
  Unit train_unit(const Result& result) const;
  Unit evaluation_unit(const std::string& label, const TaskConfig& task, std::vector<std::string> inputs,
                       int64_t rank = 0) const;
  /// evaluation.ranks below the adapter's own, sorted; none when it cannot be cut.
  std::vector<int64_t> ranks_below(const EntryConfig& entry) const;
  objectives::DataSpec data_spec(const TaskConfig& task, const std::string& split) const;
  objectives::TaskOptions options_of(const TaskConfig& task) const;
  double cost_of(const TaskConfig& task, int64_t rows) const;  // FLOPs of a forward pass
  double validation_cost(const TaskConfig& task) const;        // FLOPs of early_stopping
  /// What is trained of an entry; nullopt = all weights.
  std::optional<adapters::AdapterConfig> adapter_of(const EntryConfig& entry) const;
  void open_model();
  void open_tasks(core::Problems& problems);
  void open_validation(const TaskConfig& task, core::Problems& problems);
  objectives::ModelPlace place() const;
  void open_starts(core::Problems& problems);
  adapters::Counts counts(const std::optional<adapters::AdapterConfig>& adapter, bool started) const;
  void check_adapters(core::Problems& problems) const;
  void check_head(const EntryConfig& entry, const std::string& task, int64_t classes) const;

  core::ArtefactPtr train(const Unit& unit, WorkerContext& context) const;
  /// Watches a training as the spec says; nullptr when it does not. Keeps references to `model`, `head` and `context`.
  std::shared_ptr<EarlyStopping> early_stopping(const TrainSpec& spec, const TrainConfig& train,
                                                const models::NamedTensors& parameters, models::Backbone& model,
                                                const objectives::Head& head, WorkerContext& context) const;
  core::ArtefactPtr evaluate_unit(const Unit& unit, WorkerContext& context) const;
  std::shared_ptr<models::Backbone> load_base(const std::string& base, const std::string& dtype,
                                              WorkerContext& context) const;
  std::filesystem::path start_directory(const std::string& hash) const;
  std::shared_ptr<const objectives::Objective> load_objective(const objectives::DataSpec& spec,
                                                              WorkerContext& context) const;

  // summary.cpp
  std::optional<double> tested(const RunState& state, const std::map<std::string, std::string>& tests,
                               const std::string& task) const;
  const objectives::Metric& metric_of(const TaskConfig& task) const;
  bool one_metric() const;
  std::string labelled(const TaskConfig& task) const;
  std::vector<double> scores_of(const Stages& stages, const RunState& state, const EntryConfig& entry,
                                const TaskConfig& trained_on, const TaskConfig& tested_on) const;
  core::Json score_row(const Stages& stages, const RunState& state, const EntryConfig& entry) const;
  core::Json base_row(const Stages& stages, const RunState& state) const;
  std::string headline(const core::Json& rows) const;
  void summarize_scores(const Stages& stages, const RunState& state, core::Json& out) const;
  void summarize_every_task(const Stages& stages, const RunState& state, core::Json& out) const;
  void summarize_ranks(const Stages& stages, const RunState& state, core::Json& out) const;
  core::Json rank_row(const Stages& stages, const RunState& state, const EntryConfig& entry,
                      const TaskConfig& task) const;
  void summarize_curves(const Stages& stages, const RunState& state, core::Json& out) const;
  void summarize_stopping(const Stages& stages, const RunState& state, core::Json& out) const;

  // finetune.cpp
  const Result& find_result(const Stages& stages, const std::string& name) const;
  void export_peft(const Result& result, const core::Artefact& artefact, const std::filesystem::path& directory,
                   const std::string& base_model) const;
  void export_model(const std::string& result, const core::ArtefactPtr& artefact,
                    const std::filesystem::path& directory) const;
  std::string type_of(const EntryConfig& entry) const;
  adapters::Counts counts(const EntryConfig& entry) const;

  FinetuneConfig config_;
  std::optional<models::ModelFacts> facts_;             // of the model, once it was opened
  std::map<std::string, objectives::TaskFacts> tasks_;  // by name
  std::map<std::string, Started> started_;              // by entry
  std::string model_id_;                                // "dir:<hash>"
};

MethodEntry method_entry();

}  // namespace moraine::algorithms::finetune
