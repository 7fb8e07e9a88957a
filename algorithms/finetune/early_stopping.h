#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "algorithms/evaluate.h"
#include "algorithms/objectives/objective.h"
#include "algorithms/worker_context.h"
#include "core/config.h"
#include "core/json.h"

namespace moraine::algorithms::finetune {

/// Training ends when held-out scores stop improving. Names as in Keras and Lightning.
struct EarlyStoppingConfig {
  int64_t every = 100;       // steps between two evaluations; the last step of training is one, too
  int64_t patience = 3;      // evaluations without improvement after which training ends
  double min_delta = 0;      // an improvement is larger than this, in units of the task's score
  bool restore_best = true;  // the result has the parameters of the best evaluation, not those of the last step
  int64_t sequences = 0;     // scored validation rows; 0 = all
};
const core::Schema<EarlyStoppingConfig>& early_stopping_schema();

/// What of a training that was watched its artefact holds: steps run, the step of the best score, and all scores.
struct StoppingRecord {
  int64_t steps = 0, best_step = 0;
  std::vector<std::pair<int64_t, double>> curve;  // (step, score)

  double best_score() const;
  /// What is wrong with a record of a training of at most `steps` steps; nullopt when it can be one.
  std::optional<std::string> impossible(int64_t most_steps) const;
  core::Json to_json() const;
  static StoppingRecord from_json(const core::Json& json);
};

/// Scores the parameters every `every` steps by the task's metric, keeps a copy of the best ones (as many numbers again
/// as are trained; without restore_best none) and ends the training after `patience` evaluations in a row that are not
/// better than the best by more than min_delta.
class EarlyStopping final : public Validation {
 public:
  using Score = std::function<Evaluation(const ScoredRows& rows)>;
  using Report = std::function<void(int64_t step, double score)>;
  /// `steps`: the most that may be run. `score` scores rows of the validation split with the parameters as they are.
  EarlyStopping(const EarlyStoppingConfig& config, int64_t steps, const objectives::Metric& metric,
                models::NamedTensors parameters, Score score, Report report);

  bool due(int64_t step) const override;
  std::vector<double> sums(int64_t member, int64_t members) override;
  bool scored(int64_t step, const std::vector<double>& sums) override;

  /// For TrainJob::state: "early_stopping/best/<parameter>", "early_stopping/counts" and "early_stopping/scores".
  models::NamedTensors state() const;
  /// Gives the parameters their best values, with restore_best.
  void restore() const;
  StoppingRecord record() const;

 private:
  int64_t evaluations() const;
  int64_t best() const;  // which evaluation, from 0
  double score_at(int64_t evaluation) const;
  int64_t step_of(int64_t evaluation) const;

  const EarlyStoppingConfig config_;
  const int64_t steps_;
  const objectives::Metric metric_;
  models::NamedTensors parameters_, best_;  // best_: same order
  at::Tensor counts_, scores_;              // int64 (evaluations, best); float64, one for every evaluation there may be
  Score score_;
  Report report_;
};

}  // namespace moraine::algorithms::finetune
