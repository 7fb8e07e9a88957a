#include "worker/trainer.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <span>

#include <ATen/core/grad_mode.h>

#include "core/error.h"
#include "core/hash.h"
#include "core/log.h"
#include "models/tensor_io.h"
#include "worker/backward_updates.h"
#include "worker/checkpoint.h"
#include "worker/members.h"
#include "worker/optimizer.h"

namespace moraine::worker {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

/// The loop's own state: what a checkpoint carries besides tensors. Doubles survive JSON exactly.
struct LoopState {
  struct Interval {
    double loss_sum = 0;
    int64_t targets = 0;

    void add(double loss, int64_t count) { loss_sum += loss, targets += count; }
    double take_mean() {
      const double mean = loss_sum / static_cast<double>(targets);
      *this = {};
      return mean;
    }
  };
  int64_t step = 0;    // finished steps
  bool ended = false;  // no step follows: all are done, or held-out scores ended the training
  Interval logged;     // since the last metric point: log_every
  Interval kept;       // since the last point of the curve: kCurveEvery
  std::vector<std::pair<int64_t, double>> curve;

  core::Json to_json() const {
    return {{"step", step},
            {"ended", ended},
            {"logged", {logged.loss_sum, logged.targets}},
            {"kept", {kept.loss_sum, kept.targets}},
            {"curve", curve}};
  }
  static LoopState from_json(const core::Json& json) {
    const auto interval = [&](const char* key) { return Interval{json.at(key).at(0), json.at(key).at(1)}; };
    return {json.at("step"), json.value("ended", false), interval("logged"), interval("kept"), json.at("curve")};
  }
};

/// What a step of one member, or of all of them together, adds up to.
struct StepTotals {
  double loss_sum = 0;
  int64_t targets = 0;
  int64_t stop = 0;  // members that were asked to stop
};

class Loop {
 public:
  Loop(const algorithms::TrainJob& job, const TrainSite& site)
      : job_(job),
        site_(site),
        group_(*site.group),
        optimizer_(job.config, job.parameters, job.groups, job.space),
        exchange_(group_, optimizer_.parameters(), site.exchange) {
    if (job.update_in_backward) {
      const algorithms::TrainConfig& config = job.config;
      MORAINE_CHECK(group_.size() == 1 && config.clip_norm == 0 &&
                        (config.micro_batch_size == 0 || config.micro_batch_size >= config.batch_size),
                    "updates in backward need one process, one micro-batch and no clip_norm: {}", site.label);
      in_backward_.emplace(optimizer_);
    }
    for (const auto& [name, tensor] : job.parameters) checkpointed_.emplace_back("parameter/" + name, tensor);
    for (const auto& [name, tensor] : job.state) checkpointed_.emplace_back("kept/" + name, tensor);
    for (const auto& [name, tensor] : optimizer_.state()) checkpointed_.emplace_back("state/" + name, tensor);
  }

  TrainResult run() {
    resume();
    const Clock::time_point start = Clock::now();
    const int64_t steps = job_.config.steps;
    interval_start_ = start;
    while (!state_.ended) {
      const bool stop = one_step();
      if (stop || checkpoint_due()) save();
      site_.progress(static_cast<double>(state_.step), static_cast<double>(steps));
      site_.after_step(state_.step);
      if (stop)
        throw core::StopRequested(
            fmt::format("worker: stopped after step {} of {} of {}", state_.step, steps, site_.label));
    }
    compare_members();
    TrainResult result;
    result.outcome.curve = state_.curve;
    result.outcome.final_loss = state_.curve.empty() ? 0 : state_.curve.back().second;
    result.outcome.steps = state_.step;
    result.resumed_at = resumed_at_;
    result.optimizer_bytes = optimizer_.state_bytes();
    result.tokens = (state_.step - resumed_at_) * job_.config.batch_size * job_.tokens_per_sequence;
    result.seconds = seconds_since(start);
    return result;
  }

 private:
  void resume() {
    core::Json loop;
    if (!site_.checkpoint.empty()) loop = load_checkpoint(site_.checkpoint, site_.job, checkpointed_);
    if (group_.size() > 1) share_start(loop);
    if (loop.is_null()) return;
    state_ = LoopState::from_json(loop);
    state_.ended |= state_.step == job_.config.steps;
    resumed_at_ = logged_at_ = state_.step;
    core::log::info("training resumed: unit={} step={} of={}", site_.label, state_.step, job_.config.steps);
  }

  /// Member 0's checkpoint, or else its parameters, become everybody's.
  void share_start(core::Json& loop) {
    const std::string text = loop.dump();
    const core::Bytes shared = from_leader(comm::bytes_of(std::as_bytes(std::span(text))));
    const auto* first = reinterpret_cast<const char*>(shared.span().data());
    loop = core::Json::parse(first, first + shared.size());
    const at::NoGradGuard no_grad;
    for (const auto& [name, tensor] : checkpointed_) {
      if (loop.is_null() && name.starts_with("state/")) continue;
      const at::Tensor mine = tensor.detach().to(at::kCPU).contiguous();
      const core::Bytes bytes = from_leader(group_.index() == 0 ? bytes_of_tensor(mine) : core::Bytes());
      if (group_.index() == 0) continue;
      if (bytes.size() != mine.nbytes())
        throw GroupFailed(fmt::format("the members train different tensors: {} of {}", name, site_.label));
      at::Tensor(tensor).copy_(models::borrow({name, models::dtype_of(mine), mine.sizes().vec(), bytes.span()}));
    }
  }

  core::Bytes from_leader(core::Bytes bytes) {
    const auto came = group_.broadcast(bytes, site_.exchange.deadline);
    if (!came.ok()) throw GroupFailed(came.error());
    if (!came.value()) throw GroupFailed(fmt::format("the leader did not start {} in time", site_.label));
    return bytes;
  }

  static core::Bytes bytes_of_tensor(const at::Tensor& tensor) {
    return comm::bytes_of({static_cast<const std::byte*>(tensor.data_ptr()), tensor.nbytes()});
  }

  std::vector<core::Bytes> everybodys(core::Bytes mine) {
    auto all = group_.gather(std::move(mine), site_.exchange.deadline);
    if (!all.ok()) throw GroupFailed(all.error());
    return std::move(all.value());
  }

  /// Members that make the same updates hold the same parameters, unless their processors round differently.
  void compare_members() {
    if (group_.size() == 1) return;
    uint32_t crc = 0;
    for (const at::Tensor& parameter : optimizer_.parameters())
      crc = core::crc32c(bytes_of_tensor(parameter.detach().to(at::kCPU).contiguous()).span(), crc);
    const core::Bytes mine = comm::bytes_of(std::as_bytes(std::span(&crc, 1)));
    for (const core::Bytes& other : everybodys(mine)) {
      if (std::ranges::equal(other.span(), mine.span())) continue;
      throw core::UserError(fmt::format("worker: the members of a group end {} with different parameters", site_.label),
                            "put the members of one group on machines of one kind");
    }
  }

  void save() {
    if (!site_.checkpoint.empty()) save_checkpoint(site_.checkpoint, site_.job, state_.to_json(), checkpointed_);
  }

  bool checkpoint_due() const {
    const int64_t every = job_.config.checkpoint_every, steps = job_.config.steps;
    return steps >= 2 * every && (state_.step % every == 0 || state_.ended);
  }

  /// Returns whether the loop is to stop.
  bool one_step() {
    if (job_.before_step) job_.before_step(state_.step);
    const StepTotals totals = accumulate();
    if (!std::isfinite(totals.loss_sum)) fail("loss", totals.loss_sum);
    if (totals.targets == 0) {
      throw core::UserError(fmt::format("worker: step {} of {} has no targets", state_.step + 1, site_.label),
                            "check that the training data is not all padding");
    }
    state_.logged.add(totals.loss_sum, totals.targets);
    state_.kept.add(totals.loss_sum, totals.targets);
    const double rate = learning_rate(job_.config, state_.step);
    const double norm =
        in_backward_ ? in_backward_->finish()
                     : scale_and_clip_gradients(optimizer_.parameters(), 1.0 / static_cast<double>(totals.targets),
                                                job_.config.clip_norm);
    if (!std::isfinite(norm)) fail("gradient norm", norm);
    if (!in_backward_) optimizer_.step(rate);
    if (job_.after_update) job_.after_update(state_.step);
    ++state_.step;
    state_.ended = validation_ends() || state_.step == job_.config.steps;
    const auto due = [&](int64_t every) { return state_.step % every == 0 || state_.ended; };
    if (due(algorithms::kCurveEvery)) state_.curve.emplace_back(state_.step, state_.kept.take_mean());
    if (due(job_.config.log_every)) log_point(rate, norm);
    return totals.stop > 0;
  }

  /// What every member has, in their order.
  template <typename T>
  std::vector<std::vector<T>> gathered(std::span<const T> own) {
    std::vector<std::vector<T>> all;
    for (const core::Bytes& bytes : everybodys(comm::bytes_of(std::as_bytes(own)))) {
      if (bytes.size() != own.size_bytes()) throw GroupFailed("the members are out of step");
      std::memcpy(all.emplace_back(own.size()).data(), bytes.span().data(), bytes.size());
    }
    return all;
  }

  /// All members score their share and decide on the same sums.
  bool validation_ends() {
    if (!job_.validation || !job_.validation->due(state_.step)) return false;
    const std::vector<double> own = job_.validation->sums(group_.index(), group_.size());
    std::vector<double> all(own.size(), 0.0);
    for (const auto& other : gathered<double>(own))
      for (size_t i = 0; i < all.size(); ++i) all[i] += other[i];
    return job_.validation->scored(state_.step, all);
  }

  /// Gradients of the step's summed loss over all members.
  StepTotals accumulate() {
    const int64_t batch = job_.config.batch_size;
    const int64_t micro = job_.config.micro_batch_size > 0 ? job_.config.micro_batch_size : batch;
    StepTotals own;
    for (int64_t first = 0; first < batch; first += micro) {
      if (first + micro >= batch) exchange_.watch();
      const int64_t count = std::min(micro, batch - first);
      const int64_t begin = count * group_.index() / group_.size(), end = count * (group_.index() + 1) / group_.size();
      if (begin == end) continue;
      const auto loss = job_.loss(state_.step, first + begin, end - begin);
      own.loss_sum += loss.sum.item<double>();
      own.targets += loss.count;
      if (!std::isfinite(own.loss_sum)) continue;  // the step has failed, but members stay in step
      if (in_backward_ && loss.count > 0)
        in_backward_->begin(1.0 / static_cast<double>(loss.count), learning_rate(job_.config, state_.step));
      loss.sum.backward({}, std::nullopt, false, optimizer_.parameters());
    }
    if (site_.nan_in_first_step && state_.step == resumed_at_) own.loss_sum = std::numeric_limits<double>::quiet_NaN();
    own.stop = site_.stop_requested() ? 1 : 0;
    exchange_.launch();
    return sum_over_members(own);
  }

  StepTotals sum_over_members(const StepTotals& own) {
    if (group_.size() == 1) return own;
    StepTotals totals;
    for (const auto& other : gathered<StepTotals>({&own, 1})) {
      totals.loss_sum += other.front().loss_sum;
      totals.targets += other.front().targets;
      totals.stop += other.front().stop;
    }
    if (std::isfinite(totals.loss_sum)) exchange_.finish();
    return totals;
  }

  void log_point(double rate, double norm) {
    const auto tokens =
        static_cast<double>((state_.step - logged_at_) * job_.config.batch_size * job_.tokens_per_sequence);
    logged_at_ = state_.step;
    const double elapsed = seconds_since(interval_start_);
    interval_start_ = Clock::now();
    record("train_loss", state_.logged.take_mean());
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
  comm::Group& group_;
  Optimizer optimizer_;
  GradientExchange exchange_;
  std::optional<BackwardUpdates> in_backward_;
  models::NamedTensors checkpointed_;
  LoopState state_;
  int64_t resumed_at_ = 0, logged_at_ = 0;
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
