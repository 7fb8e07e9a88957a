#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "algorithms/unit.h"
#include "algorithms/worker_context.h"
#include "comm/channel.h"
#include "comm/local/group.h"
#include "core/metrics.h"
#include "worker/cache.h"
#include "worker/fault.h"
#include "worker/gradient_exchange.h"

namespace moraine::worker {

/// More threads than processors cost time only, but each of them is one of the system's.
inline constexpr int kMostThreads = 1024;

/// How a worker works. Only `threads`, `arithmetic`, `device` and the size of the group may change results; they are
/// part of every unit's identity.
struct WorkerOptions {
  std::string name = "worker";
  std::string version, recipe;  // the build's and the recipe's identity, said in hello: the coordinator's must be equal
  int threads = 1;              // CPU threads of this worker
  std::string arithmetic = "native";              // of the whole process: algorithms/arithmetic.h
  int workers_on_host = 1;                        // for the warning about too many threads only
  std::string device = "cpu";                     // cpu | cuda
  int device_index = 0;                           // which CUDA device: one per process of a host
  std::filesystem::path checkpoint_directory;     // empty = no checkpoints: a stopped unit starts over
  size_t artefact_cache_bytes = size_t{1} << 30;  // inputs kept in memory between units
  std::shared_ptr<ObjectCache> objects = std::make_shared<ObjectCache>(32);  // local workers may share one
  Faults faults = Faults::from_environment();
  std::shared_ptr<comm::Group> group =
      comm::local::make_group();  // who is this worker; member 0 leads (worker/members.h)
  ExchangeOptions exchange;       // of gradients in a group of several
  std::chrono::milliseconds group_deadline = std::chrono::minutes(10);  // for a member that says nothing

  at::Device cuda_device() const;
};

/// Sets the arithmetic of the process (algorithms/arithmetic.h) and throws UserError if this machine cannot do what the
/// options ask for (fewer threads than one or more than kMostThreads, another arithmetic, CUDA without LibTorch's CUDA
/// part or a device). For CUDA it also asks LibTorch for deterministic kernels in the whole process, which a resumed
/// run needs to repeat an undisturbed one: call it before other threads start and before the first tensor operation.
void check_options(const WorkerOptions& options);

/// What execute() sees, whatever lies behind it. One per unit execution, used by one thread.
/// Metrics and progress are collected and sent about four times a second; the same tick looks for stop requests.
class UnitContext : public algorithms::WorkerContext {
 public:
  /// A value of `signals` above zero asks to stop. All references must outlive the context.
  UnitContext(const algorithms::Unit& unit, int64_t attempt, const WorkerOptions& options,
              const std::atomic<int>& signals);

  algorithms::TrainOutcome train(algorithms::TrainJob job) override;
  void metric(const std::string& key, int64_t step, double value) override;
  void progress(double done, double total) override;
  at::Device device() const override;
  std::shared_ptr<void> cached(const std::string& key, const std::function<std::shared_ptr<void>()>& make) override;

  /// Sends what is still held back. Call when the unit ends, however it ends.
  void flush();
  /// Files of this unit's training jobs: to be removed once its result is accepted.
  std::vector<std::filesystem::path> checkpoints() const;
  /// {"train_seconds", "trained_tokens", "resumed_steps", "optimizer_bytes", "peak_rss_bytes"} and, on a CUDA device,
  /// "peak_device_bytes" of this unit's tensors: measured, never part of an artefact.
  core::Json stats() const;
  const algorithms::Unit& unit() const { return unit_; }

 protected:
  virtual void send_metrics(const std::vector<core::metrics::Record>& records) = 0;
  virtual void send_progress(double done, double total) = 0;
  /// Whether someone other than a signal asks to stop. Called about four times a second.
  virtual bool poll_stop() = 0;
  comm::Group& group() const { return *options_.group; }
  std::chrono::milliseconds group_deadline() const { return options_.group_deadline; }
  bool stop_requested() const { return stop_ || signals_.load() > 0; }
  [[noreturn]] void throw_stopped() const;

 private:
  void tick();
  std::filesystem::path checkpoint_path(int64_t training) const;

  const algorithms::Unit& unit_;
  const std::string unit_id_;
  const int64_t attempt_;
  const WorkerOptions& options_;
  const std::atomic<int>& signals_;
  bool stop_ = false;
  std::vector<core::metrics::Record> records_;
  double done_ = 0, total_ = 0;
  bool progress_pending_ = false;
  std::chrono::steady_clock::time_point last_tick_;
  int64_t trainings_ = 0, trained_tokens_ = 0, resumed_steps_ = 0, optimizer_bytes_ = 0;
  double train_seconds_ = 0;
};

/// A worker's (or its leader's) context: artefacts, metrics and stop requests go through the channel to the
/// coordinator, peer 0. What it fetches it passes on to the other members of its group, which ask for the same. Throws
/// CommError when the coordinator is gone, refuses this worker, or does not answer a fetch within ten minutes.
class ChannelContext : public UnitContext {
 public:
  using ArtefactCache = LruCache<core::ArtefactPtr>;
  ChannelContext(const algorithms::Unit& unit, int64_t attempt, const WorkerOptions& options,
                 const std::atomic<int>& signals, comm::Channel& channel, ArtefactCache& artefacts);
  core::ArtefactPtr artefact(const std::string& id) override;
  /// The reason of the coordinator's kStop once it has come: "done", "failed" or "stop".
  const std::optional<std::string>& stop_reason() const { return stop_reason_; }

 protected:
  void send_metrics(const std::vector<core::metrics::Record>& records) override;
  void send_progress(double done, double total) override;
  bool poll_stop() override;

 private:
  core::ArtefactPtr fetch(const std::string& id);

  comm::Channel& channel_;
  ArtefactCache& artefacts_;
  std::optional<std::string> stop_reason_;
};

/// The context of a member that is not the leader: artefacts come from the leader, metrics and progress go nowhere.
/// Throws GroupFailed when the leader does not send an artefact.
class MemberContext : public UnitContext {
 public:
  MemberContext(const algorithms::Unit& unit, int64_t attempt, const WorkerOptions& options,
                const std::atomic<int>& signals, ChannelContext::ArtefactCache& artefacts);
  core::ArtefactPtr artefact(const std::string& id) override;

 protected:
  void send_metrics(const std::vector<core::metrics::Record>&) override {}
  void send_progress(double, double) override {}
  bool poll_stop() override { return false; }

 private:
  ChannelContext::ArtefactCache& artefacts_;
};

/// The context of units that run on the coordinator, and of single-process use: everything by direct call.
class DirectContext : public UnitContext {
 public:
  struct Hooks {
    std::function<core::ArtefactPtr(const std::string& id)> artefact;
    std::function<void(const core::metrics::Record&)> metric;
    std::function<void(double done, double total)> progress;
    std::function<bool()> stop_requested = [] { return false; };
  };
  DirectContext(const algorithms::Unit& unit, int64_t attempt, const WorkerOptions& options,
                const std::atomic<int>& signals, Hooks hooks);
  core::ArtefactPtr artefact(const std::string& id) override;

 protected:
  void send_metrics(const std::vector<core::metrics::Record>& records) override;
  void send_progress(double done, double total) override;
  bool poll_stop() override;

 private:
  Hooks hooks_;
};

/// Sends to the coordinator. Throws CommError when it is gone.
void send_or_throw(comm::Channel& channel, comm::Message message);
/// The coordinator's next message, nullopt after the deadline. Throws CommError when it is gone.
std::optional<comm::Message> receive_or_throw(comm::Channel& channel, std::chrono::milliseconds deadline);

}  // namespace moraine::worker
