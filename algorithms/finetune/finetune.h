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
#include "algorithms/register.h"
#include "models/decoder_config.h"

namespace moraine::data {
class TextDataset;
}
namespace moraine::models {
class Decoder;
}
namespace moraine::algorithms {
struct Evaluation;
}

namespace moraine::algorithms::finetune {

/// Fits one model to tasks by adapters of any type, or by all its weights: every adapter with every task and seed, one
/// unit each, so they spread over workers. All of one task and seed see the same batches in the same order.
///
/// Trained: what the adapter's parametrisation says. A worker sends the adapter, or all weights where there is none.
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
    std::string hash;  // of its files
  };
  /// One result: an adapter, a task and a seed.
  struct Result {
    const EntryConfig* entry = nullptr;
    const TaskConfig* task = nullptr;
    int64_t seed = 0;
    std::optional<std::string> artefact;
    std::map<std::string, std::string> tests;  // by task: evaluation

    std::string name() const;
  };
  struct Stages {
    std::map<std::string, std::string> base;  // by task: evaluation
    std::vector<Result> results;              // adapters, then tasks, then seeds, as in the recipe
    bool complete = true;
  };
  Stages walk(PlanBuilder& plan) const;
  Unit train_unit(const Result& result) const;
  Unit evaluation_unit(const std::string& label, const TaskConfig& task, std::vector<std::string> inputs) const;
  TextSpec text_spec(const TaskConfig& task, const std::string& split) const;
  /// What is trained of an entry; nullopt = all weights.
  std::optional<adapters::AdapterConfig> adapter_of(const EntryConfig& entry) const;
  /// As tables call it.
  std::string type_name(const EntryConfig& entry) const;
  void open_starts(core::Problems& problems);
  adapters::Counts counts(const std::optional<adapters::AdapterConfig>& adapter, bool started) const;
  void check_adapters(core::Problems& problems) const;

  core::ArtefactPtr train(const Unit& unit, WorkerContext& context) const;
  core::ArtefactPtr evaluate_unit(const Unit& unit, WorkerContext& context) const;
  std::shared_ptr<models::Decoder> load_base(const std::string& base, const std::string& dtype,
                                             WorkerContext& context) const;
  std::filesystem::path start_directory(const std::string& hash) const;
  std::shared_ptr<data::TextDataset> load_text(const TextSpec& spec, WorkerContext& context) const;

  // summary.cpp
  std::optional<Evaluation> tested(const RunState& state, const std::map<std::string, std::string>& tests,
                                   const std::string& task) const;
  void summarize_scores(const Stages& stages, const RunState& state, core::Json& out) const;
  void summarize_every_task(const Stages& stages, const RunState& state, core::Json& out) const;
  void summarize_curves(const Stages& stages, const RunState& state, core::Json& out) const;

  // finetune.cpp
  const Result& find_result(const Stages& stages, const std::string& name) const;
  models::Decoder fitted_model(const core::ArtefactPtr& result) const;

  FinetuneConfig config_;
  models::DecoderConfig architecture_;
  std::map<std::string, std::string> fingerprints_;  // of the tasks' texts
  std::map<std::string, Started> started_;           // by entry
  std::string model_id_;                             // "dir:<hash>"
};

MethodEntry method_entry();

}  // namespace moraine::algorithms::finetune
