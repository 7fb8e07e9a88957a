#include "worker/trainer.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>

#include <ATen/core/grad_mode.h>

#include "core/error.h"
#include "core/log.h"
#include "worker/checkpoint.h"
#include "worker/optimizer.h"

namespace moraine::worker {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

/// The loop's own state: what a checkpoint carries besides tensors. Doubles survive JSON exactly.
struct LoopState {
  int64_t step = 0;     // finished steps
  double loss_sum = 0;  // of the targets since the last curve point
  int64_t targets = 0;
  std::vector<std::pair<int64_t, double>> curve;

  core::Json to_json() const {
    return {{"step", step}, {"loss_sum", loss_sum}, {"targets", targets}, {"curve", curve}};
  }
  static LoopState from_json(const core::Json& json) {
    return {json.at("step"), json.at("loss_sum"), json.at("targets"), json.at("curve")};
  }
};

class Loop {
 public:
  Loop(const algorithms::TrainJob& job, const TrainSite& site)
      : job_(job), site_(site), optimizer_(job.config, job.parameters) {
    for (const auto& [name, tensor] : job.parameters) checkpointed_.emplace_back("parameter/" + name, tensor);
    for (const auto& [name, tensor] : optimizer_.state()) checkpointed_.emplace_back("state/" + name, tensor);
  }

  TrainResult run() {
    resume();
    const Clock::time_point start = Clock::now();
    const int64_t steps = job_.config.steps;
    interval_start_ = start;
    while (state_.step < steps) {
      one_step();
      const bool stop = site_.stop_requested();
      if (stop || checkpoint_due()) save();
      site_.progress(static_cast<double>(state_.step), static_cast<double>(steps));
      site_.after_step(state_.step);
      if (stop)
        throw core::StopRequested(
            fmt::format("worker: stopped after step {} of {} of {}", state_.step, steps, site_.label));
    }
    TrainResult result;
    result.outcome.curve = state_.curve;
    result.outcome.final_loss = state_.curve.empty() ? 0 : state_.curve.back().second;
    result.resumed_at = resumed_at_;
    result.tokens = (steps - resumed_at_) * job_.config.batch_size * job_.tokens_per_sequence;
    result.seconds = seconds_since(start);
    return result;
  }

 private:
  void resume() {
    if (site_.checkpoint.empty()) return;
    const core::Json loop = load_checkpoint(site_.checkpoint, site_.job, checkpointed_);
    if (loop.is_null()) return;
    state_ = LoopState::from_json(loop);
    resumed_at_ = state_.step;
    core::log::info("training resumed: unit={} step={} of={}", site_.label, state_.step, job_.config.steps);
  }

  void save() {
    if (!site_.checkpoint.empty()) save_checkpoint(site_.checkpoint, site_.job, state_.to_json(), checkpointed_);
  }

  bool checkpoint_due() const {
    const int64_t every = job_.config.checkpoint_every, steps = job_.config.steps;
    return steps >= 2 * every && (state_.step % every == 0 || state_.step == steps);
  }

  void one_step() {
    const int64_t targets = accumulate();
    const double rate = learning_rate(job_.config, state_.step);
    const double norm =
        scale_and_clip_gradients(optimizer_.parameters(), 1.0 / static_cast<double>(targets), job_.config.clip_norm);
    if (!std::isfinite(norm)) fail("gradient norm", norm);
    optimizer_.step(rate);
    ++state_.step;
    if (state_.step % job_.config.log_every == 0 || state_.step == job_.config.steps) log_point(rate, norm);
  }

  /// Gradients of the step's summed loss; returns the number of targets.
  int64_t accumulate() {
    const int64_t batch = job_.config.batch_size;
    const int64_t micro = job_.config.micro_batch_size > 0 ? job_.config.micro_batch_size : batch;
    double loss_sum = 0;
    int64_t targets = 0;
    for (int64_t first = 0; first < batch; first += micro) {
      const auto loss = job_.loss(state_.step, first, std::min(micro, batch - first));
      loss_sum += loss.sum.item<double>();
      targets += loss.count;
      if (site_.nan_in_first_step && state_.step == resumed_at_) loss_sum = std::numeric_limits<double>::quiet_NaN();
      if (!std::isfinite(loss_sum)) fail("loss", loss_sum);
      loss.sum.backward({}, std::nullopt, false, optimizer_.parameters());
    }
    if (targets == 0) {
      throw core::UserError(fmt::format("worker: step {} of {} has no targets", state_.step + 1, site_.label),
                            "check that the training data is not all padding");
    }
    state_.loss_sum += loss_sum;
    state_.targets += targets;
    return targets;
  }

  void log_point(double rate, double norm) {
    const double mean = state_.loss_sum / static_cast<double>(state_.targets);
    state_.curve.emplace_back(state_.step, mean);
    state_.loss_sum = 0;
    state_.targets = 0;
    const int64_t before =
        std::max(resumed_at_, state_.curve.size() > 1 ? state_.curve[state_.curve.size() - 2].first : 0);
    const auto tokens = static_cast<double>((state_.step - before) * job_.config.batch_size * job_.tokens_per_sequence);
    const double elapsed = seconds_since(interval_start_);
    interval_start_ = Clock::now();
    record("train_loss", mean);
    record("learning_rate", rate);
    record("grad_norm", norm);
    if (elapsed > 0) record("tokens_per_s", tokens / elapsed);
  }

  void record(const std::string& key, double value) { site_.metric({site_.label, key, state_.step, value}); }

  [[noreturn]] void fail(const char* what, double value) {
    // A retry from the checkpoint would only walk into the same numbers.
    std::error_code ignored;
    if (!site_.checkpoint.empty()) std::filesystem::remove(site_.checkpoint, ignored);
    throw core::NumericError(
        fmt::format("worker: {} is {} at step {} of {}", what, value, state_.step + 1, site_.label),
        "lower train.learning_rate, lengthen train.warmup_steps, or look at this unit's training data");
  }

  const algorithms::TrainJob& job_;
  const TrainSite& site_;
  Optimizer optimizer_;
  models::NamedTensors checkpointed_;
  LoopState state_;
  int64_t resumed_at_ = 0;
  Clock::time_point interval_start_;
};

}  // namespace

TrainResult train(const algorithms::TrainJob& job, const TrainSite& site) {
  const algorithms::TrainConfig& config = job.config;
  MORAINE_CHECK(config.steps > 0 && config.batch_size > 0 && config.checkpoint_every > 0 && config.log_every > 0,
                "training of {} was not validated", site.label);
  const at::AutoGradMode with_gradients(true);
  return Loop(job, site).run();
}

}  // namespace moraine::worker
