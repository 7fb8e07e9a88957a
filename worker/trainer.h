#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>

#include "algorithms/worker_context.h"
#include "comm/local/group.h"
#include "core/metrics.h"
#include "worker/gradient_exchange.h"

namespace moraine::worker {

/// What the training loop needs from its surroundings.
struct TrainSite {
  std::string job;                   // names the job in its checkpoint: unit id and index of the train() call
  std::string label;                 // unit label, for people and metrics
  std::filesystem::path checkpoint;  // file; empty = never write one
  std::function<void(const core::metrics::Record&)> metric;
  std::function<void(double done, double total)> progress;         // steps; called after every step
  std::function<bool()> stop_requested;                            // asked in every step; it still ends
  std::function<void(int64_t step)> after_step = [](int64_t) {};   // after everything a step does; tests die here
  bool nan_in_first_step = false;                                  // fault injection
  std::shared_ptr<comm::Group> group = comm::local::make_group();  // who trains this job together
  ExchangeOptions exchange{};
};

struct TrainResult {
  algorithms::TrainOutcome outcome;
  int64_t resumed_at = 0;  // steps a checkpoint had already done
  int64_t tokens = 0;      // trained in this process
  double seconds = 0;
  int64_t optimizer_bytes = 0;  // Optimizer::state_bytes()
};

/// Runs a job to its end: per step, micro-batches accumulate gradients of their summed losses; the sum is divided by
/// the number of targets of the step, clipped and applied. Only the job's parameters receive gradients.
///
/// In a group every member calls train() with the same job and computes its share of every micro-batch: of sequences
/// [first, first + n) member i of m takes those from first + n i / m. Gradients, losses and numbers of targets are
/// summed over the members, then each makes the same update; a stop that one member is asked for stops all after the
/// same step. Member 0's parameters (and, resumed, its whole state) are where all start; only member 0 needs a
/// checkpoint path. The result differs from one process's by the rounding of sums over the batch, which are cut in m
/// parts; it is the same every time and for every back end but nccl.
///
/// Where the job's validation is due, every member scores its share of the held-out data; the sums over all members, in
/// their order, decide alike at each whether the step was the last. Steps and schedule are planned for config.steps.
///
/// Every log_every steps (and after the last) records train_loss (mean nats per target since the previous point),
/// learning_rate, grad_norm (before clipping) and tokens_per_s; `step` counts finished steps.
/// A checkpoint is written every checkpoint_every steps and after the last step if the job is at least two such
/// intervals long, and always before StopRequested is thrown. Resumed or not, parameters, curve and final loss have the
/// same bits, provided the thread count is the same: sums over a batch are split by thread, so a unit's bits depend on
/// it. That is why workers.threads is part of a unit's identity.
///
/// With TrainJob::update_in_backward parameters move during backward (worker/backward_updates.h), to the same bits.
///
/// Throws NumericError naming step and unit on a loss or gradient norm that is not finite (the checkpoint is removed,
/// so a retry starts from the beginning), StopRequested after a checkpoint, InternalError on parameters that are not
/// float32 leaves, IoError when a checkpoint cannot be written, GroupFailed when another member fails or is gone,
/// UserError when the members end with different parameters. Runs on the calling thread.
TrainResult train(const algorithms::TrainJob& job, const TrainSite& site);

}  // namespace moraine::worker
