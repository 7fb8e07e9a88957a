#include "worker/trainer.h"

#include <cmath>
#include <fstream>
#include <limits>
#include <optional>

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "core/file.h"
#include "tests/worker/tiny_job.h"

namespace moraine::worker {
namespace {

using algorithms::TrainJob;
using testing::flat;
using ::testing::HasSubstr;
using testing::tiny_job;

constexpr int64_t kSteps = 11;

struct Recorder {
  TrainSite site;
  std::vector<core::metrics::Record> records;
  std::optional<int64_t> stop_after;  // ask to stop when this many steps are done
  int64_t done = 0;

  explicit Recorder(const std::filesystem::path& checkpoint = {}) {
    site.job = "unit/0";
    site.label = "train/tiny";
    site.checkpoint = checkpoint;
    site.metric = [this](const core::metrics::Record& record) { records.push_back(record); };
    site.stop_requested = [this] { return ++done == stop_after; };
    site.progress = [](double, double) {};
  }
};

struct Final {
  std::vector<float> parameters;
  algorithms::TrainOutcome outcome;
  int64_t resumed_at = 0;
  void expect_same_bits(const Final& other) const {
    EXPECT_EQ(parameters, other.parameters);
    EXPECT_EQ(outcome.curve, other.outcome.curve);
    EXPECT_EQ(outcome.final_loss, other.outcome.final_loss);
  }
};

Final finish(const TrainJob& job, const TrainSite& site) {
  const TrainResult result = train(job, site);
  return {flat(job.parameters), result.outcome, result.resumed_at};
}

class Trainer : public ::testing::Test {
 protected:
  testing::TempDirectory directory_;
  const std::filesystem::path checkpoint_ = directory_.path() / "job.safetensors";
  const Final uninterrupted_ = finish(tiny_job(kSteps), Recorder().site);
};

TEST_F(Trainer, StoppedAnywhereAndResumedEqualsUninterruptedBitForBit) {
  for (const std::string optimizer : {"adamw", "sgd"}) {
    TrainJob reference = tiny_job(kSteps);
    reference.config.optimizer = optimizer;
    reference.config.momentum = 0.9;
    const Final expected = finish(reference, Recorder().site);
    for (int64_t stop_after : {1, 4, 6, 10, 11}) {
      SCOPED_TRACE(optimizer + " stopped after " + std::to_string(stop_after));
      std::filesystem::remove(checkpoint_);
      TrainJob job = tiny_job(kSteps);
      job.config = reference.config;
      Recorder first(checkpoint_);
      first.stop_after = stop_after;
      EXPECT_THROW(train(job, first.site), core::StopRequested);
      TrainJob again = tiny_job(kSteps);
      again.config = reference.config;
      const Final resumed = finish(again, Recorder(checkpoint_).site);
      EXPECT_EQ(resumed.resumed_at, stop_after);
      resumed.expect_same_bits(expected);
    }
  }
}

TEST_F(Trainer, UpdatesInBackwardHaveTheBitsOfUpdatesBehindIt) {
  for (const std::string optimizer : {"adamw", "sgd", "adamw8bit"}) {
    const auto job_with = [&](bool in_backward) {
      TrainJob job = tiny_job(kSteps);
      job.config.optimizer = optimizer;
      job.config.momentum = 0.9;
      job.config.clip_norm = 0;
      job.groups = {{{"outer"}, 4.0, 0.5}};
      job.update_in_backward = in_backward;
      return job;
    };
    const TrainJob behind = job_with(false), within = job_with(true);
    Recorder usual, recorder;
    const Final expected = finish(behind, usual.site), found = finish(within, recorder.site);
    found.expect_same_bits(expected);
    ASSERT_EQ(recorder.records.size(), usual.records.size());
    for (size_t i = 0; i < usual.records.size(); ++i)
      if (usual.records[i].key == "grad_norm") {
        // The same float32 norms, summed in another order.
        EXPECT_NEAR(recorder.records[i].value, usual.records[i].value, 1e-6 * usual.records[i].value);
      }
    for (const auto& [name, parameter] : within.parameters) EXPECT_FALSE(parameter.grad().defined()) << name;
    // No hook stays behind: a backward pass leaves its gradients where they are.
    within.loss(0, 0, 1).sum.backward();
    for (const auto& [name, parameter] : within.parameters) EXPECT_TRUE(parameter.grad().defined()) << name;
  }
}

TEST_F(Trainer, UpdatesInBackwardHoldOneGradientAtATime) {
  TrainJob job = tiny_job(2);
  job.config.clip_norm = 0;
  job.update_in_backward = true;
  int64_t seen = 0;
  const auto parameters = job.parameters;
  job.loss = [&, loss = job.loss](int64_t step, int64_t first, int64_t num) {
    auto result = loss(step, first, num);
    // "outer" is nearer to the loss than "inner": when a gradient reaches inner, outer's has been used.
    parameters[0].second.register_hook([&](const at::Tensor&) {
      ++seen;
      EXPECT_FALSE(parameters[1].second.grad().defined());
    });
    return result;
  };
  const at::Tensor before = parameters[1].second.detach().clone();
  (void)train(job, Recorder().site);
  EXPECT_GE(seen, 2);
  EXPECT_FALSE(before.equal(parameters[1].second));
}

TEST_F(Trainer, AGradientThatIsNotFiniteFailsBeforeItUpdates) {
  TrainJob job = tiny_job(3);
  job.config.clip_norm = 0;
  job.update_in_backward = true;
  job.loss = [loss = job.loss](int64_t step, int64_t first, int64_t num) {
    auto result = loss(step, first, num);
    result.sum.register_hook(
        [](const at::Tensor& gradient) { return gradient.mul(std::numeric_limits<double>::quiet_NaN()); });
    return result;
  };
  const std::vector<float> before = flat(job.parameters);
  EXPECT_THROW(train(job, Recorder().site), core::NumericError);
  EXPECT_EQ(flat(job.parameters), before);
}

/// Scores the first parameter's first value after every second step; ends the training at step 6.
class EndsAtSix final : public algorithms::Validation {
 public:
  explicit EndsAtSix(const TrainJob& job) : parameter_(job.parameters.front().second) {}
  bool due(int64_t step) const override { return step % 2 == 0; }
  std::vector<double> sums(int64_t member, int64_t members) override {
    EXPECT_EQ(members, 1);
    EXPECT_EQ(member, 0);
    return {parameter_.detach().flatten()[0].item<double>(), 1};
  }
  bool scored(int64_t step, const std::vector<double>& sums) override {
    EXPECT_EQ(sums.at(1), 1);
    EXPECT_EQ(static_cast<float>(sums.at(0)), parameter_.detach().flatten()[0].item<float>());
    seen_.push_back(step);
    return step == 6;
  }
  const std::vector<int64_t>& seen() const { return seen_; }

 private:
  at::Tensor parameter_;
  std::vector<int64_t> seen_;
};

TEST_F(Trainer, ValidationEndsTrainingAsIfTheStepWereTheLast) {
  TrainJob watched = tiny_job(kSteps);
  const auto validation = std::make_shared<EndsAtSix>(watched);
  watched.validation = validation;
  Recorder recorder;
  const TrainResult result = train(watched, recorder.site);
  EXPECT_EQ(validation->seen(), (std::vector<int64_t>{2, 4, 6}));
  EXPECT_EQ(result.outcome.steps, 6);
  EXPECT_EQ(result.tokens, 6 * 6 * 2) << "of batches of 6 sequences of 2 tokens";
  ASSERT_EQ(result.outcome.curve.size(), 1u);
  EXPECT_EQ(result.outcome.curve[0].first, 6);
  EXPECT_EQ(recorder.records.back().step, 6) << "the last point is logged";
  // The schedule is that of all steps: a training of six steps ends elsewhere, one stopped after six there.
  EXPECT_NE(flat(watched.parameters), finish(tiny_job(6), Recorder().site).parameters);
  TrainJob cut = tiny_job(kSteps);
  Recorder stopping(checkpoint_);
  stopping.stop_after = 6;
  EXPECT_THROW(train(cut, stopping.site), core::StopRequested);
  EXPECT_EQ(flat(watched.parameters), flat(cut.parameters));
  EXPECT_EQ(train(tiny_job(kSteps), Recorder().site).outcome.steps, kSteps);
}

TEST_F(Trainer, AResumedTrainingEndsWhereItsValidationEndedIt) {
  const auto watched = [&](int64_t stop_after) {
    TrainJob job = tiny_job(kSteps);
    job.validation = std::make_shared<EndsAtSix>(job);
    Recorder recorder(checkpoint_);
    if (stop_after > 0) recorder.stop_after = stop_after;
    return finish(job, recorder.site);
  };
  const Final whole = watched(0);
  for (const int64_t stop_after : {3, 6}) {  // 6: stopped in the step that ends it, or killed right after
    std::filesystem::remove(checkpoint_);
    EXPECT_THROW(watched(stop_after), core::StopRequested);
    const Final resumed = watched(0);
    EXPECT_EQ(resumed.resumed_at, stop_after);
    EXPECT_EQ(resumed.outcome.steps, 6);
    resumed.expect_same_bits(whole);
  }
}

TEST_F(Trainer, KilledAfterAPeriodicCheckpointResumesThereWithTheSameBits) {
  Recorder dying(checkpoint_);
  dying.site.after_step = [](int64_t step) {
    if (step == 8) throw std::runtime_error("killed");
  };
  EXPECT_THROW(train(tiny_job(kSteps), dying.site), std::runtime_error);
  const Final resumed = finish(tiny_job(kSteps), Recorder(checkpoint_).site);
  EXPECT_EQ(resumed.resumed_at, 6);  // checkpoint_every is 3
  resumed.expect_same_bits(uninterrupted_);
  EXPECT_EQ(finish(tiny_job(kSteps), Recorder(checkpoint_).site).resumed_at, kSteps)
      << "the end is kept for later train() calls";
}

TEST_F(Trainer, HooksMoveStateThatAResumedRunFindsAgain) {
  // A running sum of the first parameter, taken after every update, which the next step's hook adds to it.
  const auto job_with_hooks = [] {
    TrainJob job = tiny_job(kSteps);
    const at::Tensor parameter = job.parameters.front().second, sum = at::zeros_like(parameter.detach());
    job.state = {{"sum", sum}};
    job.before_step = [=](int64_t step) {
      const at::NoGradGuard no_grad;
      at::Tensor(parameter).add_(sum, 1e-3 * static_cast<double>(step));
    };
    job.after_update = [=](int64_t) {
      const at::NoGradGuard no_grad;
      at::Tensor(sum).add_(parameter);
    };
    return job;
  };
  const Final whole = finish(job_with_hooks(), Recorder().site);
  EXPECT_NE(whole.parameters, uninterrupted_.parameters);
  Recorder first(checkpoint_);
  first.stop_after = 5;
  EXPECT_THROW(train(job_with_hooks(), first.site), core::StopRequested);
  const Final resumed = finish(job_with_hooks(), Recorder(checkpoint_).site);
  EXPECT_EQ(resumed.resumed_at, 5);
  resumed.expect_same_bits(whole);
}

TEST_F(Trainer, CheckpointThatCannotBeTrustedIsIgnored) {
  Recorder stopped(checkpoint_);
  stopped.stop_after = 5;
  EXPECT_THROW(train(tiny_job(kSteps), stopped.site), core::StopRequested);
  const std::string good = core::read_text(checkpoint_);
  std::string flipped = good;
  flipped[good.size() - 10] = char(flipped[good.size() - 10] ^ 1);
  for (const std::string& bytes : {flipped, good.substr(0, good.size() - 1), good.substr(0, good.size() / 2),
                                   good.substr(0, 7), std::string(), std::string("no safetensors at all")}) {
    SCOPED_TRACE(bytes.size());
    core::write_atomically(checkpoint_, bytes);
    const Final fresh = finish(tiny_job(kSteps), Recorder(checkpoint_).site);
    EXPECT_EQ(fresh.resumed_at, 0);
    fresh.expect_same_bits(uninterrupted_);
  }
  core::write_atomically(checkpoint_, good);
  Recorder other(checkpoint_);
  other.site.job = "another unit/0";
  EXPECT_EQ(finish(tiny_job(kSteps), other.site).resumed_at, 0);
  core::write_atomically(checkpoint_, good);
  TrainJob renamed = tiny_job(kSteps);
  renamed.parameters[1].first = "renamed";
  EXPECT_EQ(finish(renamed, Recorder(checkpoint_).site).resumed_at, 0);
}

TEST_F(Trainer, ShortJobsWriteNoCheckpoint) {
  train(tiny_job(5), Recorder(checkpoint_).site);  // fewer than two intervals of 3
  EXPECT_FALSE(std::filesystem::exists(checkpoint_));
}

TEST_F(Trainer, MicroBatchesChangeTheResultByRoundingOnly) {
  for (int64_t micro : {1, 2, 4}) {  // 4 does not divide the batch of 6
    TrainJob job = tiny_job(kSteps);
    job.config.micro_batch_size = micro;
    const Final final = finish(job, Recorder().site);
    ASSERT_EQ(final.parameters.size(), uninterrupted_.parameters.size());
    // AdamW turns a gradient's relative rounding (1e-7) into the update's; 11 updates of at most 0.05.
    for (size_t i = 0; i < final.parameters.size(); ++i)
      EXPECT_NEAR(final.parameters[i], uninterrupted_.parameters[i], 2e-5);
  }
}

TEST_F(Trainer, SgdOnAQuadraticFollowsItsClosedForm) {
  // Loss (w - 3)^2 / 2 on two targets per sequence: the mean's gradient is w - 3, so w_t = 3 - 3 (1 - lr)^t.
  const at::Tensor w = at::zeros({1}, at::kFloat).set_requires_grad(true);
  TrainJob job = tiny_job(20);
  job.config.optimizer = "sgd";
  job.config.schedule = "constant";
  job.config.learning_rate = 0.25;
  job.config.warmup_steps = 0;
  job.config.weight_decay = 0;
  job.config.clip_norm = 0;
  job.config.log_every = 1;
  job.parameters = {{"w", w}};
  job.loss = [w](int64_t, int64_t, int64_t num) {
    return TrainJob::MicroLoss{w.sub(3).square().sum().mul(0.5 * 2 * static_cast<double>(num)), 2 * num};
  };
  Recorder recorder;
  train(job, recorder.site);
  EXPECT_NEAR(w.item<double>(), 3 - 3 * std::pow(0.75, 20), 1e-6);
  int64_t points = 0;
  for (const auto& record : recorder.records) {
    if (record.key != "train_loss") continue;
    EXPECT_EQ(record.step, ++points);
    EXPECT_NEAR(record.value, 4.5 * std::pow(0.75, 2.0 * static_cast<double>(points - 1)), 1e-5) << points;
  }
  EXPECT_EQ(points, 20);
}

TEST_F(Trainer, OnlyTheJobsParametersReceiveGradients) {
  const at::Tensor other = at::ones({1}, at::kFloat).set_requires_grad(true);
  TrainJob job = tiny_job(1);
  job.loss = [inner = job.loss, other](int64_t step, int64_t first, int64_t num) {
    auto loss = inner(step, first, num);
    loss.sum = loss.sum.mul(other.squeeze());
    return loss;
  };
  train(job, Recorder().site);
  EXPECT_FALSE(other.grad().defined());
}

TEST_F(Trainer, MetricsComeEveryIntervalAndAfterTheLastStep) {
  Recorder recorder;
  train(tiny_job(kSteps), recorder.site);
  std::vector<int64_t> steps;
  for (const auto& record : recorder.records) {
    EXPECT_EQ(record.unit, "train/tiny");
    EXPECT_TRUE(std::isfinite(record.value)) << record.key;
    if (record.key == "train_loss") steps.push_back(record.step);
  }
  EXPECT_THAT(steps, ::testing::ElementsAre(4, 8, 11));
  EXPECT_EQ(recorder.records.size(), 4 * steps.size());  // loss, rate, norm, tokens/s
}

TEST_F(Trainer, TheCurveDoesNotDependOnHowOftenIsLogged) {
  const auto curve = [&](int64_t log_every) {
    TrainJob job = tiny_job(25);
    job.config.log_every = log_every;
    return train(job, Recorder().site).outcome;
  };
  const auto often = curve(1), rarely = curve(1000);
  EXPECT_EQ(often.curve, rarely.curve);
  EXPECT_EQ(often.final_loss, rarely.final_loss);
  ASSERT_EQ(often.curve.size(), 3u);
  for (size_t i = 0; i < 3; ++i)
    EXPECT_EQ(often.curve[i].first, std::min<int64_t>(10 * static_cast<int64_t>(i + 1), 25));
}

TEST_F(Trainer, NanLossEndsWithStepAndUnitAndARetryStartsClean) {
  TrainJob job = tiny_job(kSteps);
  job.loss = [inner = job.loss](int64_t step, int64_t first, int64_t num) {
    auto loss = inner(step, first, num);
    if (step == 7) loss.sum = loss.sum.mul(std::numeric_limits<double>::quiet_NaN());
    return loss;
  };
  try {
    train(job, Recorder(checkpoint_).site);
    FAIL() << "a NaN loss went unnoticed";
  } catch (const core::NumericError& error) {
    EXPECT_THAT(error.what(), HasSubstr("loss is nan at step 8 of train/tiny"));
    EXPECT_FALSE(error.hint().empty());
  }
  const Final retried = finish(tiny_job(kSteps), Recorder(checkpoint_).site);
  EXPECT_EQ(retried.resumed_at, 0);
  retried.expect_same_bits(uninterrupted_);
}

TEST_F(Trainer, InfiniteGradientOfAFiniteLossIsCaught) {
  const at::Tensor w = at::zeros({1}, at::kFloat).set_requires_grad(true);
  TrainJob job = tiny_job(3);
  job.parameters = {{"w", w}};
  job.loss = [w](int64_t, int64_t, int64_t) { return TrainJob::MicroLoss{w.sqrt().sum(), 1}; };
  try {
    train(job, Recorder().site);
    FAIL() << "an infinite gradient went unnoticed";
  } catch (const core::NumericError& error) {
    EXPECT_THAT(error.what(), HasSubstr("gradient norm is inf at step 1 of train/tiny"));
  }
  EXPECT_EQ(w.item<float>(), 0) << "the bad gradient must not be applied";
}

TEST_F(Trainer, StepWithoutTargetsIsAnError) {
  TrainJob job = tiny_job(3);
  job.loss = [inner = job.loss](int64_t step, int64_t first, int64_t num) {
    return TrainJob::MicroLoss{inner(step, first, num).sum, 0};
  };
  EXPECT_THROW(train(job, Recorder().site), core::UserError);
}

}  // namespace
}  // namespace moraine::worker
