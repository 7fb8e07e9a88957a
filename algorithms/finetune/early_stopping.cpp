#include "algorithms/finetune/early_stopping.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>

#include "core/error.h"

namespace moraine::algorithms::finetune {

const core::Schema<EarlyStoppingConfig>& early_stopping_schema() {
  using C = EarlyStoppingConfig;
  static const auto schema =
      core::Schema<C>()
          .field("every", &C::every)
          .min(1)
          .unit("steps")
          .doc("Steps between two scores on validation data; the last step is scored, too")
          .field("patience", &C::patience)
          .min(1)
          .doc("Scores in a row without an improvement after which training ends")
          .field("min_delta", &C::min_delta)
          .min(0)
          .doc("An improvement on the best score is larger than this, in units of the task's score")
          .field("restore_best", &C::restore_best)
          .doc("The result has the parameters of the best score, not those of the last step; keeps a copy of them")
          .field("sequences", &C::sequences)
          .min(0)
          .doc("Scored validation sequences, examples, questions or images; 0 = all");
  return schema;
}

double StoppingRecord::best_score() const {
  return std::ranges::find(curve, best_step, &std::pair<int64_t, double>::first)->second;
}

std::optional<std::string> StoppingRecord::impossible(int64_t most_steps) const {
  int64_t last = 0;
  bool best = false;
  for (const auto& [step, score] : curve) {
    if (step <= last || !std::isfinite(score)) return "holds impossible validation scores";
    last = step;
    best |= step == best_step;
  }
  if (best && steps == last && steps <= most_steps) return std::nullopt;
  return fmt::format("says that {} steps of {} were run and step {} is the best", steps, most_steps, best_step);
}

core::Json StoppingRecord::to_json() const { return {{"steps", steps}, {"best_step", best_step}, {"curve", curve}}; }

StoppingRecord StoppingRecord::from_json(const core::Json& json) {
  return {json.at("steps"), json.at("best_step"), json.at("curve")};
}

EarlyStopping::EarlyStopping(const EarlyStoppingConfig& config, int64_t steps, const objectives::Metric& metric,
                             models::NamedTensors parameters, Score score, Report report)
    : config_(config),
      steps_(steps),
      metric_(metric),
      parameters_(std::move(parameters)),
      counts_(at::zeros({2}, at::kLong)),
      scores_(at::zeros({(steps + config.every - 1) / config.every}, at::kDouble)),
      score_(std::move(score)),
      report_(std::move(report)) {
  if (!config_.restore_best) return;
  for (const auto& [name, tensor] : parameters_) best_.emplace_back(name, tensor.detach().clone());
}

int64_t EarlyStopping::evaluations() const { return counts_.const_data_ptr<int64_t>()[0]; }
int64_t EarlyStopping::best() const { return counts_.const_data_ptr<int64_t>()[1]; }
double EarlyStopping::score_at(int64_t evaluation) const { return scores_.const_data_ptr<double>()[evaluation]; }
int64_t EarlyStopping::step_of(int64_t evaluation) const { return std::min((evaluation + 1) * config_.every, steps_); }

bool EarlyStopping::due(int64_t step) const { return step % config_.every == 0 || step == steps_; }

std::vector<double> EarlyStopping::sums(int64_t member, int64_t members) {
  const Evaluation own = score_({config_.sequences, member, members});
  return {own.nats, static_cast<double>(own.tokens), static_cast<double>(own.bytes), static_cast<double>(own.correct)};
}

bool EarlyStopping::scored(int64_t step, const std::vector<double>& sums) {
  const at::NoGradGuard no_grad;
  const double score =
      metric_.of({sums.at(0), std::llround(sums.at(1)), std::llround(sums.at(2)), std::llround(sums.at(3))});
  const int64_t evaluation = evaluations();
  MORAINE_CHECK_EQ(step_of(evaluation), step);
  const double gain = evaluation == 0            ? 0
                      : metric_.higher_is_better ? score - score_at(best())
                                                 : score_at(best()) - score;
  scores_.mutable_data_ptr<double>()[evaluation] = score;
  counts_.mutable_data_ptr<int64_t>()[0] = evaluation + 1;
  report_(step, score);
  if (evaluation == 0 || gain > config_.min_delta) {
    counts_.mutable_data_ptr<int64_t>()[1] = evaluation;
    for (size_t i = 0; i < best_.size(); ++i) best_[i].second.copy_(parameters_[i].second);
  }
  return evaluation - best() >= config_.patience;
}

models::NamedTensors EarlyStopping::state() const {
  models::NamedTensors all;
  for (const auto& [name, tensor] : best_) all.emplace_back("early_stopping/best/" + name, tensor);
  all.emplace_back("early_stopping/counts", counts_);
  all.emplace_back("early_stopping/scores", scores_);
  return all;
}

void EarlyStopping::restore() const {
  const at::NoGradGuard no_grad;
  for (size_t i = 0; i < best_.size(); ++i) at::Tensor(parameters_[i].second).copy_(best_[i].second);
}

StoppingRecord EarlyStopping::record() const {
  StoppingRecord record{step_of(evaluations() - 1), step_of(best()), {}};
  for (int64_t i = 0; i < evaluations(); ++i) record.curve.emplace_back(step_of(i), score_at(i));
  return record;
}

}  // namespace moraine::algorithms::finetune
