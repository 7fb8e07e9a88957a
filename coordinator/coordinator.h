#pragma once

#include <atomic>
#include <chrono>
#include <deque>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "comm/channel.h"
#include "coordinator/accepted_state.h"
#include "coordinator/core.h"
#include "coordinator/journal.h"
#include "coordinator/run_directory.h"
#include "core/metrics.h"
#include "core/progress.h"

namespace moraine::coordinator {

/// Drives one run to its end: joins the state machine (Core) with workers, journal, store, metrics and progress bar.
/// Used by one thread; units with Place::kCoordinator run on one background thread, one at a time.
class Coordinator {
 public:
  struct Options : Core::Options {
    bool terminal = false;  // stderr is one: draw a bar
  };
  /// Runs a unit here. Called on the background thread; may use state().
  using Execute = std::function<core::ArtefactPtr(const algorithms::Unit&)>;

  /// Replays the journal and re-reads every accepted artefact; what is damaged runs again. Above zero,
  /// `signals` asks to stop: the workers checkpoint and the run ends with exit code 75. Throws IoError if the journal
  /// is damaged or the directory cannot be written.
  Coordinator(const RunDirectory& directory, comm::Channel& channel, Core::Planner plan, Execute execute,
              Options options, const std::atomic<int>& signals);
  ~Coordinator();  // waits for the background thread

  const AcceptedState& state() const { return state_; }

  /// Returns when the plan has nothing left, a unit failed for good, the run was stopped or the disk gave out. Whatever
  /// was accepted is durable by then, and opening the same directory again continues. Errors come back in the outcome.
  /// With `abort_workers` a unit may still run on the background thread, which the destructor would wait for.
  RunOutcome run();

 private:
  void handle(Event event);
  void apply_or_break(const Effect& effect);
  void apply(const effect::Lease& lease);
  void apply(const effect::Accept& accept);
  void apply(const effect::RecordFailure& failure);
  void apply(const effect::Refuse& refuse);
  void apply(const effect::StopWorkers& stop);
  void apply(const effect::Log& line) { core::log::write(line.level, line.text); }
  void apply(const effect::Finish& finish);

  void receive();
  void answer_fetch(int worker, const core::Json& body);
  void collect_unit_run_here();
  void watch_clock();
  void send(int worker, comm::Message message);
  double now() const;

  RunLayout layout_;
  comm::Channel& channel_;
  Execute execute_;
  Options options_;
  const std::atomic<int>& signals_;
  std::chrono::steady_clock::time_point origin_ = std::chrono::steady_clock::now();

  Journal journal_;
  AcceptedState state_;
  std::unique_ptr<core::metrics::Sink> metrics_, curves_;  // the same records as JSON lines and for TensorBoard
  Core core_;
  core::Progress progress_;

  std::deque<Event> events_;               // that effects of the current event led to
  std::map<std::string, double> started_;  // unit -> unix time of its lease
  std::future<Event> here_;                // the unit that runs on the coordinator
  bool stop_passed_on_ = false;
  double last_tick_ = 0;
  double shown_ = 0;  // of the progress bar: it does not go back when the plan grows
  std::optional<RunOutcome> outcome_;
};

}  // namespace moraine::coordinator
