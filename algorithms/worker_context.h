#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "core/artefact.h"
#include "core/config.h"
#include "models/slot.h"

namespace moraine::algorithms {

/// How a set of tensors is trained; one field table, shared by all recipes (key `train`).
struct TrainConfig {
  int64_t steps = 100;
  int64_t batch_size = 16;          // sequences per optimiser step
  int64_t micro_batch_size = 0;     // sequences per forward; 0 = batch_size
  std::string optimizer = "adamw";  // adamw | adamw8bit | sgd
  double learning_rate = 1e-3;
  double beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8, momentum = 0.0;
  double weight_decay = 0.0;
  std::string schedule = "cosine";  // constant | linear | cosine, after warm-up
  double final_lr_ratio = 0.1;      // the schedule ends at learning_rate * this
  int64_t warmup_steps = 0;
  double clip_norm = 1.0;         // 0 = off
  std::string dtype = "float32";  // compute type of the frozen model: float32 | bfloat16; trained tensors and optimiser
                                  // state stay float32
  int64_t checkpoint_every = 50;  // steps; not part of a unit's identity
  int64_t log_every = 10;         // steps; not part of a unit's identity
};
const core::Schema<TrainConfig>& train_schema();
/// What TrainConfig::optimizer may be.
const std::vector<std::string>& optimizer_names();

/// What determines a training result, as JSON for a unit's spec: TrainConfig without checkpoint_every and log_every.
core::Json train_identity(const TrainConfig& config);
/// What train_identity() wrote, as a worker runs it: keys that change no result are its own, `own`. Throws UserError if
/// `identity` was written by another version.
TrainConfig train_config(const core::Json& identity, const TrainConfig& own);

/// Parameters that move otherwise than TrainConfig says.
struct ParameterGroup {
  std::vector<std::string> names;      // of TrainJob::parameters
  double lr_factor = 1;                // times the learning rate of the step
  std::optional<double> weight_decay;  // instead of TrainConfig's
};

/// Where the optimiser moves some parameters instead of in the parameters themselves: it gets gradients of another
/// shape, keeps moments of that shape, and what it would add there is brought back. Used by one thread.
class UpdateSpace {
 public:
  virtual ~UpdateSpace() = default;
  /// Shape of what moves instead of a parameter; nullopt: the parameter itself moves.
  virtual std::optional<std::vector<int64_t>> shape(const std::string& parameter) const = 0;
  /// A parameter's gradient, scaled and clipped, in the space. Called once for every update of the parameter, so the
  /// space may move with it.
  virtual at::Tensor project(const std::string& parameter, const at::Tensor& gradient) = 0;
  /// The change of the parameter that a change in the space means.
  virtual at::Tensor project_back(const std::string& parameter, const at::Tensor& change) const = 0;
  /// What a resumed run needs, by names "<parameter>/<what>"; live tensors: copying into them restores the space.
  virtual models::NamedTensors state() const = 0;
};

/// Scores on held-out data while a job is trained, which may end the training. Used by one thread.
class Validation {
 public:
  virtual ~Validation() = default;
  /// Whether the parameters are scored when `step` steps are finished.
  virtual bool due(int64_t step) const = 0;
  /// Sums over this member's share of the data, the same number of values at every member of the group.
  virtual std::vector<double> sums(int64_t member, int64_t members) = 0;
  /// Called at every member with the sums over all members, in their order. True: training ends here, as if `step` were
  /// the last. What it remembers stands in TrainJob::state, so that a resumed run decides alike.
  virtual bool scored(int64_t step, const std::vector<double>& sums) = 0;
};

/// One training job as a method sees it: which tensors, which loss. The worker owns the loop.
struct TrainJob {
  TrainConfig config;
  models::NamedTensors parameters;  // leaves with requires_grad, float32 on the worker's device
  /// Loss of micro-batch `micro` of step `step`: the sum over its targets and their number. The loop divides by the
  /// total count of the step's targets, so accumulation does not change the result beyond rounding.
  struct MicroLoss {
    at::Tensor sum;
    int64_t count = 0;
  };
  std::function<MicroLoss(int64_t step, int64_t first_sequence, int64_t num_sequences)> loss;
  int64_t tokens_per_sequence = 0;          // for tokens/s
  std::vector<ParameterGroup> groups = {};  // a parameter stands in one at most
  /// Tensors that move without gradients, by the hooks and by `validation`: checkpointed and handed to a group's
  /// members like parameters.
  models::NamedTensors state = {};
  /// Called at every member before the first micro-batch of a step and after the step's update, `step` from 0. What
  /// they draw comes from derive_seed and the step, so that a resumed run keeps its bits.
  std::function<void(int64_t step)> before_step = nullptr, after_update = nullptr;
  std::shared_ptr<UpdateSpace> space = nullptr;
  std::shared_ptr<Validation> validation = nullptr;
  /// Every parameter is updated as soon as backward has its gradient, which is freed then: the gradients of a step are
  /// never all there. The updates are the same, so it needs a step of one micro-batch in one process, without
  /// clip_norm.
  bool update_in_backward = false;
};

/// Steps between the points of TrainOutcome::curve. Not log_every: curves are stored in artefacts, which do not depend
/// on how often a run is logged.
constexpr int64_t kCurveEvery = 10;

/// What a finished (or resumed and finished) job reports.
struct TrainOutcome {
  double final_loss = 0;                          // mean nats per target since the last but one point of the curve
  std::vector<std::pair<int64_t, double>> curve;  // (step, mean nats per target since the previous point)
  int64_t steps = 0;                              // TrainConfig::steps, or where TrainJob::validation ended it
};

/// What a worker offers to Method::execute(). One per unit execution.
class WorkerContext {
 public:
  virtual ~WorkerContext() = default;
  /// An input artefact, fetched from the coordinator when this worker does not have it.
  virtual core::ArtefactPtr artefact(const std::string& id) = 0;
  /// Runs the loop: optimiser, schedule, clipping, accumulation, checkpoints, resume, metrics, stop requests, NaN
  /// checks. Bit-identical whether or not it was interrupted. Throws NumericError with step and unit on a non-finite
  /// loss or gradient norm, StopRequested after a checkpoint.
  virtual TrainOutcome train(TrainJob job) = 0;
  virtual void metric(const std::string& key, int64_t step, double value) = 0;
  /// Progress of work outside train(): done of total, any unit. Throws StopRequested when the run is stopping.
  virtual void progress(double done, double total) = 0;
  virtual at::Device device() const = 0;
  /// The worker's cache for objects that several units share (a loaded base, an open data set), by key.
  virtual std::shared_ptr<void> cached(const std::string& key, const std::function<std::shared_ptr<void>()>& make) = 0;
};

}  // namespace moraine::algorithms
