#pragma once

#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "algorithms/unit.h"
#include "coordinator/scheduler.h"
#include "core/artefact.h"
#include "core/log.h"

namespace moraine::coordinator {

/// How a run ended. `abort_workers`: some worker (or the unit that runs here) did not answer and may never end by
/// itself: whoever holds the processes or threads ends them instead of waiting.
struct RunOutcome {
  int exit_code = 0;
  std::string message;
  std::string hint;
  bool abort_workers = false;
};

struct WorkerInfo {
  std::string host;
  int64_t pid = 0;
  int64_t threads = 1;
  std::string device;
  std::string version;
  std::string recipe = {};  // hash of what its recipe determines; "" = it does not say
};

/// Why an attempt failed: user | io | numeric | internal | memory as the worker says, artefact (its bytes are bad) or
/// gone (the worker is) as the coordinator finds.
struct Problem {
  std::string kind;
  std::string text;
  std::string hint;
};
int exit_code_of(const std::string& problem_kind);

/// An exception as the reason of a failure: user | io | numeric | memory | internal.
Problem problem_of(const std::exception& error);
/// The same as the end of a run.
RunOutcome outcome_of(const std::exception& error);

/// What happens to a run. Worker 0 is the coordinator itself, which runs units with Place::kCoordinator.
// clang-format off
namespace event {
struct Start {};
struct Hello { int worker; WorkerInfo info; };
struct Poll { int worker; };
struct Heard { int worker; };   // any other sign of life
struct Progress { int worker; std::string unit; double done; double total; };
struct Finished { int worker; std::string unit; int attempt; core::ArtefactPtr artefact; double seconds; core::Json stats; };
struct Failed { int worker; std::string unit; int attempt; Problem problem; };
struct Accepted { std::string unit; };   // the answer to effect::Accept once artefact and journal are durable
struct Stopped { int worker; };
struct Gone { int worker; std::string reason; int code = 0; std::string hint = {}; };   // code: what it ends with, 0 = unknown
struct StopRequested {};
struct Broken { RunOutcome outcome; };   // something that is no unit failed (disk, plan): stop, then end with this
struct Tick {};
}  // namespace event
using Event = std::variant<event::Start, event::Hello, event::Poll, event::Heard, event::Progress, event::Finished,
                           event::Failed, event::Accepted, event::Stopped, event::Gone, event::StopRequested,
                           event::Broken, event::Tick>;

/// What to do about it, in order.
namespace effect {
struct Lease { int worker; algorithms::Unit unit; int attempt; std::string id; };   // worker 0: run it here
struct Accept { algorithms::Unit unit; std::string host; event::Finished result; };   // store, journal, then event::Accepted
struct RecordFailure { algorithms::Unit unit; int worker; std::string host; int attempt; Problem problem; std::string id; };
struct Refuse { int worker; int code; std::string text; std::string hint = {}; };   // code: the exit code of the worker
struct StopWorkers { std::string reason; };
struct Log { core::log::Level level; std::string text; };
struct Finish { RunOutcome outcome; };   // the last effect of a run
}  // namespace effect
// clang-format on
using Effect = std::variant<effect::Lease, effect::Accept, effect::RecordFailure, effect::Refuse, effect::StopWorkers,
                            effect::Log, effect::Finish>;

/// The coordinator's decisions as a pure state machine: no socket, thread, clock or file. It leases what the plan
/// offers, retries what fails (elsewhere first), refuses what was not leased, and ends the run. Same events, same
/// effects. Every wait ends by a message or by a deadline that event::Tick finds passed (docs/recovery.md).
///
/// A plan costs time that grows with the run, so not every result is followed by one: it must be worth it
/// (plan_is_due). Everything else costs the logarithm of the number of units.
class Core {
 public:
  struct Options {
    int max_attempts = 3;      // per unit and start
    double stop_grace_s = 60;  // how long stopping workers may take to write their checkpoints
    double stall_s = 1800;     // a worker silent for longer loses its unit and is not waited for
    double greet_s = 600;      // a worker that has said nothing for so long after the start is not waited for
    // What a worker's hello must say: one that differs is refused. "" and 0 ask for nothing.
    std::string version = {}, recipe = {}, device = {};
    int64_t threads = 0;
    /// Throws if the artefact cannot be what the unit asks for: its attempt has failed then (kind "artefact").
    std::function<void(const algorithms::Unit&, const core::Artefact&)> check_result = nullptr;
    /// What a run with nothing left to do lacks: it then ends with this sentence and exit code 2 instead of 0.
    std::function<std::optional<std::string>(const algorithms::RunState&)> missing_result = nullptr;
    /// Seconds, monotonic: what planning costs. By default it costs nothing and follows every result.
    std::function<double()> clock = [] { return 0.0; };
  };
  using Planner = std::function<algorithms::Plan(const algorithms::RunState&)>;

  /// `state` must hold a unit's result before event::Accepted names it; it outlives the core.
  Core(int num_workers, Options options, Planner plan, const algorithms::RunState& state);

  /// `now` is in seconds, from any monotonic origin. What the planner throws ends the run.
  std::vector<Effect> step(double now, const Event& event);

  /// Seconds spent in the planner so far, by Options::clock.
  double planning_seconds() const { return planning_s_; }

  /// For a progress bar. In predicted seconds; units finished in earlier starts count as done. A unit that tells its
  /// progress corrects the prediction of its kind, so that a wrong one does not last until a unit has ended. Units that
  /// the plan will only ask for later are not in it.
  struct Work {
    double done = 0;
    double total = 0;
    double remaining_s = 0;  // until the workers are through, longest unit first; infinite while no speed is known
    std::string running;     // labels
  };
  Work work() const;

 private:
  struct Worker {
    WorkerInfo info;
    bool greeted = false;
    bool waiting = false;  // asked for a unit
    bool gone = false;
    bool silent = false;  // not waited for, because it says nothing; any message makes up for it
    bool stopped = false;
    bool ever_leased = false;
    double heard_at = 0;
    std::string unit;  // leased to it, "" when none
  };
  struct Job {
    std::string_view id;  // its key in jobs_
    algorithms::Unit unit;
    enum class State { kReady, kLeased, kStoring } state = State::kReady;
    int worker = 0;
    int attempt = 1;
    std::set<int> failed_on;
    double leased_at = 0;
    struct Report {
      double at = 0, share = 0;
    };
    std::optional<Report> first, last;  // progress in this attempt; a resumed unit begins in the middle

    double share_done() const { return state == State::kStoring ? 1 : (last ? last->share : 0); }
    /// What the whole unit takes at the speed between its reports; nullopt before they tell one.
    std::optional<double> measured_seconds() const;
  };
  struct Ending {
    RunOutcome outcome;
    double deadline = 0;
  };

  void on(const event::Start&);
  void on(const event::Hello&);
  void on(const event::Poll&);
  void on(const event::Heard&) {}
  void on(const event::Progress&);
  void on(const event::Finished&);
  void on(const event::Failed&);
  void on(const event::Accepted&);
  void on(const event::Stopped&);
  void on(const event::Gone&);
  void on(const event::StopRequested&);
  void on(const event::Broken&);
  void on(const event::Tick&);

  bool plan_is_due() const;
  void replan();
  void dispatch();
  void end_when_stopped();
  void lease_ready();
  void end_without_workers();
  void refuse(int worker, RunOutcome why);
  void finish_complete();
  void set_state(Job& job, Job::State state);
  ReadyQueue& queue_of(const Job& job);
  Candidate candidate(const Job& job) const;
  void lease(int worker, const std::string& unit);
  void fail_attempt(const std::string& unit, const Problem& problem);
  void begin_ending(RunOutcome outcome);
  void finish(const std::string& reason, RunOutcome outcome);
  void note_idle_workers();
  void withdraw_unit_of(int worker, const Problem& problem);
  bool leased_to(const std::string& unit, int worker, int attempt) const;
  bool running_anywhere() const;
  bool may_try(const Job& job, int worker) const;
  bool some_worker_is_stuck() const;
  std::string name_of(int worker) const;
  double remaining_seconds(const Scheduler& scheduler) const;
  template <typename... Args>
  void log(core::log::Level level, fmt::format_string<Args...> text, Args&&... args) {
    effects_.push_back(effect::Log{level, fmt::format(text, std::forward<Args>(args)...)});
  }

  int num_workers_;
  Options options_;
  Planner plan_;
  const algorithms::RunState& state_;
  Scheduler scheduler_;
  std::vector<Worker> workers_;                   // [0] is the coordinator itself
  std::map<std::string, Job, std::less<>> jobs_;  // by unit id: ready or running
  ReadyQueue ready_, ready_here_;                 // those in state kReady: for workers, for the coordinator
  std::map<std::string, double> finished_cost_;   // by kind, for work()
  std::set<std::string> accepted_;                // since the last plan
  bool started_ = false, planned_once_ = false;
  double started_at_ = 0;
  double planned_at_ = 0, plan_took_s_ = 0, planning_s_ = 0;  // the last plan; all of them
  std::optional<RunOutcome> cause_;                           // why a worker left, for the case that all do
  std::optional<RunOutcome> failure_;                         // a unit failed for good: nothing new starts
  std::optional<Ending> ending_;                              // workers were told to stop
  bool over_ = false;
  bool noted_idle_ = false;
  size_t most_ready_ = 0;  // most worker units there were at once
  double now_ = 0;
  std::vector<Effect> effects_;
};

}  // namespace moraine::coordinator
