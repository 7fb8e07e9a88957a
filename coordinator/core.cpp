#include "coordinator/core.h"

#include <algorithm>
#include <limits>
#include <new>

#include <fmt/ranges.h>

#include "core/error.h"

namespace moraine::coordinator {

using core::log::Level;

namespace {

// How many times as long as the last plan took to wait before the next one while everybody has work, so that planning
// is a twentieth of the coordinator's time; and while a worker waits for a unit that a plan may offer.
constexpr double kPlanPause = 20, kPlanPauseWhileSomeoneWaits = 2;

}  // namespace

int exit_code_of(const std::string& problem_kind) {
  static const std::map<std::string, int> codes = {
      {"user", core::kExitUser},   {"io", core::kExitIo},   {"memory", core::kExitIo},
      {"artefact", core::kExitIo}, {"gone", core::kExitIo}, {"numeric", core::kExitNumeric},
  };
  const auto found = codes.find(problem_kind);
  return found == codes.end() ? core::kExitInternal : found->second;
}

Problem problem_of(const std::exception& error) {
  if (dynamic_cast<const std::bad_alloc*>(&error) != nullptr) {
    return {"memory", "out of memory", "use a machine with more memory, a smaller batch or fewer processes per host"};
  }
  const auto* ours = dynamic_cast<const core::Error*>(&error);
  if (ours == nullptr) return {"internal", error.what(), ""};
  const char* kind = ours->exit_code() == core::kExitUser      ? "user"
                     : ours->exit_code() == core::kExitIo      ? "io"
                     : ours->exit_code() == core::kExitNumeric ? "numeric"
                                                               : "internal";
  return {kind, error.what(), ours->hint()};
}

RunOutcome outcome_of(const std::exception& error) {
  const Problem problem = problem_of(error);
  return {exit_code_of(problem.kind), problem.text, problem.hint};
}

Core::Core(int num_workers, Options options, Planner plan, const algorithms::RunState& state)
    : num_workers_(num_workers),
      options_(std::move(options)),
      plan_(std::move(plan)),
      state_(state),
      workers_(static_cast<size_t>(num_workers_) + 1) {
  workers_[0].greeted = true;
}

std::vector<Effect> Core::step(double now, const Event& event) {
  now_ = now;
  effects_.clear();
  if (over_) return {};
  std::visit(
      [this](const auto& what) {
        if constexpr (requires { what.worker; }) {
          MORAINE_CHECK(what.worker >= 0 && what.worker <= num_workers_, "coordinator: no worker {}", what.worker);
          Worker& worker = workers_[static_cast<size_t>(what.worker)];
          worker.heard_at = now_;
          worker.silent = false;
        }
        on(what);
      },
      event);
  if (!over_) dispatch();
  return std::move(effects_);
}

void Core::on(const event::Start&) {
  if (num_workers_ == 0) {
    finish("failed", {core::kExitUser, "coordinator: there are no workers",
                      "start at least two processes, or run without mpirun"});
    return;
  }
  started_ = true;
  started_at_ = now_;
}

void Core::on(const event::Hello& hello) {
  const WorkerInfo& info = hello.info;
  Worker& worker = workers_[static_cast<size_t>(hello.worker)];
  worker.info = info;
  const auto differs = [&](const std::string& what, const auto& ours, const auto& theirs, const std::string& hint) {
    refuse(hello.worker, {core::kExitUser,
                          fmt::format("{} has another {} than the coordinator: {} against {}", name_of(hello.worker),
                                      what, theirs, ours),
                          hint});
  };
  if (info.version != options_.version)
    return differs("build of Moraine", options_.version, info.version, "install the same build on every host");
  if (!options_.recipe.empty() && info.recipe != options_.recipe)
    return differs(
        "recipe", options_.recipe, info.recipe,
        "give every process the same recipe file, arguments and MORAINE_* variables (mpirun -x NAME forwards "
        "one; `moraine validate` prints where each value comes from)");
  if (!options_.device.empty() && info.device != options_.device)
    return differs("device", options_.device, info.device, "set workers.device alike for every process");
  if (options_.threads != 0 && info.threads != options_.threads)
    return differs("number of threads", options_.threads, info.threads, "set workers.threads alike for every process");
  worker.greeted = true;
  log(Level::kInfo, "worker joined: worker={} host={} pid={} threads={} device={}", hello.worker, info.host, info.pid,
      info.threads, info.device);
}

void Core::refuse(int index, RunOutcome why) {
  effects_.push_back(effect::Refuse{index, why.exit_code, why.message, why.hint});
  on(event::Gone{index, why.message, why.exit_code, why.hint});
}

void Core::on(const event::Poll& poll) {
  Worker& worker = workers_[static_cast<size_t>(poll.worker)];
  if (worker.gone) return;  // it was refused and has not read that yet
  if (!worker.greeted) {
    refuse(poll.worker, {core::kExitInternal, "the first message of a worker must be hello", ""});
  } else if (worker.unit.empty()) {
    worker.waiting = true;
  } else {
    log(Level::kDebug, "poll ignored, the worker has a unit: worker={} unit={}", poll.worker, worker.unit);
  }
}

void Core::on(const event::Progress& progress) {
  const auto found = jobs_.find(progress.unit);
  if (found == jobs_.end() || found->second.worker != progress.worker || !(progress.total > 0)) return;
  Job& job = found->second;
  job.last = {now_, std::clamp(progress.done / progress.total, 0.0, 1.0)};
  if (!job.first) job.first = job.last;
}

void Core::on(const event::Finished& result) {
  if (!leased_to(result.unit, result.worker, result.attempt)) {
    if (state_.result(result.unit) == result.artefact->id()) {
      log(Level::kDebug, "duplicate result ignored: unit={} worker={}", result.unit, result.worker);
    } else {
      log(Level::kWarn, "result refused, the unit is not leased to this worker: unit={} worker={} attempt={}",
          result.unit, result.worker, result.attempt);
    }
    return;
  }
  Job& job = jobs_.at(result.unit);
  Worker& worker = workers_[static_cast<size_t>(result.worker)];
  try {
    if (options_.check_result) options_.check_result(job.unit, *result.artefact);
  } catch (const std::exception& error) {
    return withdraw_unit_of(result.worker, {"artefact", error.what(), problem_of(error).hint});
  }
  set_state(job, Job::State::kStoring);
  worker.unit.clear();
  scheduler_.measured(job.unit.kind, result.worker, job.unit.cost, result.seconds);
  effects_.push_back(effect::Accept{job.unit, worker.info.host, result});
}

void Core::on(const event::Failed& failed) {
  if (!leased_to(failed.unit, failed.worker, failed.attempt)) {
    log(Level::kWarn, "failure ignored, the unit is not leased to this worker: unit={} worker={} attempt={}",
        failed.unit, failed.worker, failed.attempt);
    return;
  }
  withdraw_unit_of(failed.worker, failed.problem);
}

void Core::on(const event::Accepted& accepted) {
  const auto job = jobs_.find(accepted.unit);
  if (job == jobs_.end()) return;
  finished_cost_[job->second.unit.kind] += job->second.unit.cost;
  accepted_.insert(accepted.unit);
  jobs_.erase(job);
}

void Core::on(const event::Stopped& stopped) {
  Worker& worker = workers_[static_cast<size_t>(stopped.worker)];
  const std::string unit = std::exchange(worker.unit, "");
  // No failure: its checkpoint waits for the next taker.
  if (!unit.empty()) set_state(jobs_.at(unit), Job::State::kReady);
  worker.waiting = false;
  worker.stopped = true;
  if (!ending_ && stopped.worker != 0) {
    log(Level::kWarn, "worker stopped by itself: worker={} host={}", stopped.worker, worker.info.host);
    worker.gone = true;
  }
}

void Core::on(const event::Gone& gone) {
  Worker& worker = workers_[static_cast<size_t>(gone.worker)];
  if (worker.gone) return;
  worker.gone = true;
  worker.waiting = false;
  if (gone.code != 0 && !cause_) cause_ = RunOutcome{gone.code, gone.reason, gone.hint};
  log(Level::kWarn, "worker is gone: worker={} host={} reason={}", gone.worker, worker.info.host, gone.reason);
  withdraw_unit_of(gone.worker, {"gone", fmt::format("worker {} is gone: {}", name_of(gone.worker), gone.reason), ""});
}

void Core::on(const event::StopRequested&) {
  begin_ending({core::kExitRequeue, "stopped by a signal; everything finished is kept",
                "run the same command again to continue"});
}

void Core::on(const event::Broken& broken) { begin_ending(broken.outcome); }

void Core::on(const event::Tick&) {
  for (int index = 1; index <= num_workers_; ++index) {
    Worker& worker = workers_[static_cast<size_t>(index)];
    if (worker.gone || worker.stopped || worker.silent || worker.waiting) continue;
    const double longest = worker.greeted ? options_.stall_s : options_.greet_s;
    if (now_ - std::max(worker.heard_at, started_at_) <= longest) continue;
    worker.silent = true;
    const std::string what = fmt::format("{} gave no sign of life for {:.0f} s", name_of(index), longest);
    log(Level::kWarn, "worker is not waited for any more: {}", what);
    withdraw_unit_of(index, {"gone", what, ""});
  }
}

/// Whether to plan anew. At once when nothing else is left to do; otherwise planning must not take the time that
/// accepting and leasing need, so a pause follows each plan, a short one while a worker waits.
bool Core::plan_is_due() const {
  if (!started_ || (planned_once_ && accepted_.empty())) return false;
  if (jobs_.empty()) return true;
  const auto waiting = static_cast<size_t>(
      std::count_if(workers_.begin() + 1, workers_.end(), [](const Worker& worker) { return worker.waiting; }));
  const double pause = plan_took_s_ * (waiting > ready_.size() ? kPlanPauseWhileSomeoneWaits : kPlanPause);
  return now_ - planned_at_ >= pause;
}

void Core::replan() {
  const double begin = options_.clock();
  algorithms::Plan plan;
  try {
    plan = plan_(state_);
  } catch (const std::exception& error) {
    log(Level::kError, "the run cannot be planned: {}", error.what());
    return begin_ending(outcome_of(error));
  }
  plan_took_s_ = options_.clock() - begin;
  planning_s_ += plan_took_s_;
  planned_at_ = now_ + plan_took_s_;
  planned_once_ = true;
  MORAINE_CHECK_EQ(plan.pending.size(), plan.pending_ids.size());
  finished_cost_ = std::move(plan.finished_cost);
  const std::set<std::string_view> pending(plan.pending_ids.begin(), plan.pending_ids.end());
  std::erase_if(jobs_, [&](const auto& entry) {
    const bool unwanted = entry.second.state == Job::State::kReady && !pending.contains(entry.first);
    if (unwanted) queue_of(entry.second).erase(candidate(entry.second));
    return unwanted;
  });
  size_t worker_units = 0;
  for (size_t i = 0; i < plan.pending.size(); ++i) {
    algorithms::Unit& unit = plan.pending[i];
    if (accepted_.contains(plan.pending_ids[i])) {
      return begin_ending({core::kExitInternal,
                           fmt::format("coordinator: the plan asks again for a finished unit: {}", unit.label),
                           "this is a bug in Moraine: please report it with this message"});
    }
    if (unit.place == algorithms::Place::kWorker) ++worker_units;
    const auto [entry, added] = jobs_.try_emplace(std::move(plan.pending_ids[i]));
    if (!added) continue;
    entry->second.id = entry->first;
    entry->second.unit = std::move(unit);
    queue_of(entry->second).insert(candidate(entry->second));
  }
  accepted_.clear();
  most_ready_ = std::max(most_ready_, worker_units);
}

ReadyQueue& Core::queue_of(const Job& job) {
  return job.unit.place == algorithms::Place::kCoordinator ? ready_here_ : ready_;
}

Candidate Core::candidate(const Job& job) const { return {job.id, job.unit.kind, job.unit.cost + job.unit.follows}; }

void Core::set_state(Job& job, Job::State state) {
  if (job.state == Job::State::kReady) queue_of(job).erase(candidate(job));
  if (state == Job::State::kReady) queue_of(job).insert(candidate(job));
  job.state = state;
}

void Core::dispatch() {
  if (!ending_ && !failure_ && plan_is_due()) replan();
  if (ending_) return end_when_stopped();
  if (failure_) {
    if (!running_anywhere()) finish("failed", *failure_);
    return;
  }
  if (!started_) return;
  if (jobs_.empty()) {
    note_idle_workers();
    return finish_complete();
  }
  const bool any_alive = std::any_of(workers_.begin() + 1, workers_.end(),
                                     [](const Worker& worker) { return !worker.gone && !worker.silent; });
  if (!any_alive) return end_without_workers();
  lease_ready();
}

/// The plan has nothing left: whether that is success is the method's to say.
void Core::finish_complete() {
  try {
    const auto missing = options_.missing_result ? options_.missing_result(state_) : std::nullopt;
    if (!missing) return finish("done", {});
    finish("failed", {core::kExitUser, *missing,
                      "nothing is left to run and everything finished is kept: look at the recipe with `moraine "
                      "validate`"});
  } catch (const std::exception& error) {
    finish("failed", outcome_of(error));
  }
}

void Core::end_when_stopped() {
  const bool all_stopped =
      std::all_of(workers_.begin() + 1, workers_.end(),
                  [](const Worker& worker) { return !worker.greeted || worker.gone || worker.stopped; }) &&
      workers_[0].unit.empty();
  if (!all_stopped && now_ < ending_->deadline) return;
  RunOutcome outcome = ending_->outcome;
  outcome.abort_workers = !all_stopped || some_worker_is_stuck();
  if (!all_stopped) log(Level::kWarn, "some workers did not stop in time: grace_s={:.0f}", options_.stop_grace_s);
  over_ = true;
  effects_.push_back(effect::Finish{std::move(outcome)});
}

/// A signal that reached the workers first comes before what else made them leave.
void Core::end_without_workers() {
  const bool stopped =
      std::any_of(workers_.begin() + 1, workers_.end(), [](const Worker& worker) { return worker.stopped; });
  RunOutcome outcome{core::kExitIo, "coordinator: all workers have left", "run the same command again to continue"};
  if (stopped) {
    outcome.exit_code = core::kExitRequeue;
  } else if (cause_) {
    outcome = *cause_;
    outcome.message = "coordinator: all workers have left: " + outcome.message;
  }
  begin_ending(std::move(outcome));
  end_when_stopped();
}

void Core::lease_ready() {
  std::vector<std::pair<int, std::string_view>> leases;
  if (workers_[0].unit.empty()) {
    ready_here_.visit(scheduler_, [&](std::string_view id) {
      leases.emplace_back(0, id);
      return false;
    });
  }
  std::vector<int> waiting;
  for (int index = 1; index <= num_workers_; ++index) {
    if (workers_[static_cast<size_t>(index)].waiting) waiting.push_back(index);
  }
  if (!waiting.empty() && !ready_.empty()) {
    scheduler_.sort(waiting);
    ready_.visit(scheduler_, [&](std::string_view id) {
      const Job& job = jobs_.find(id)->second;
      const auto taker = std::find_if(waiting.begin(), waiting.end(), [&](int worker) { return may_try(job, worker); });
      if (taker == waiting.end()) return true;
      leases.emplace_back(*taker, id);
      waiting.erase(taker);
      return !waiting.empty();
    });
  }
  for (const auto& [worker, id] : leases) lease(worker, std::string(id));
  if (noted_idle_ || waiting.empty() || most_ready_ >= workers_.size() - 1) return;
  const bool all_asked = std::all_of(workers_.begin() + 1, workers_.end(), [](const Worker& worker) {
    return worker.gone || worker.waiting || !worker.unit.empty();
  });
  if (!all_asked) return;
  noted_idle_ = true;
  log(Level::kInfo, "more workers than units that can run now: nothing to do yet for workers={} units={}",
      fmt::join(waiting, ","), most_ready_);
}

void Core::lease(int index, const std::string& unit) {
  Job& job = jobs_.at(unit);
  Worker& worker = workers_[static_cast<size_t>(index)];
  set_state(job, Job::State::kLeased);
  job.worker = index;
  job.leased_at = now_;
  job.first = job.last = std::nullopt;
  worker.unit = unit;
  worker.waiting = false;
  worker.ever_leased = true;
  worker.heard_at = now_;
  effects_.push_back(effect::Lease{index, job.unit, job.attempt, unit});
}

void Core::withdraw_unit_of(int index, const Problem& problem) {
  const std::string unit = std::exchange(workers_[static_cast<size_t>(index)].unit, "");
  if (!unit.empty()) fail_attempt(unit, problem);
}

void Core::fail_attempt(const std::string& unit, const Problem& problem) {
  Job& job = jobs_.at(unit);
  const int attempt = job.attempt;
  effects_.push_back(effect::RecordFailure{job.unit, job.worker, workers_[static_cast<size_t>(job.worker)].info.host,
                                           attempt, problem, unit});
  job.failed_on.insert(job.worker);
  set_state(job, Job::State::kReady);
  ++job.attempt;
  // The coordinator itself would only meet the same wrong input again.
  const bool hopeless = job.worker == 0 && problem.kind == "user";
  if (!hopeless && attempt < options_.max_attempts) {
    log(Level::kWarn, "unit failed and will be retried: unit={} worker={} attempt={}/{} kind={} text={}",
        job.unit.label, job.worker, attempt, options_.max_attempts, problem.kind, problem.text);
    return;
  }
  log(Level::kError, "unit failed for good: unit={} worker={} attempt={}/{} kind={} text={}", job.unit.label,
      job.worker, attempt, options_.max_attempts, problem.kind, problem.text);
  if (failure_) return;
  failure_ = RunOutcome{
      exit_code_of(problem.kind),
      fmt::format("unit {} failed {} time{}, last on {}: {}", job.unit.label, attempt, attempt == 1 ? "" : "s",
                  name_of(job.worker), problem.text),
      problem.hint.empty() ? "everything finished is kept: run the same command again to try once more" : problem.hint};
}

void Core::begin_ending(RunOutcome outcome) {
  if (ending_) return;
  ending_ = Ending{std::move(outcome), now_ + options_.stop_grace_s};
  effects_.push_back(effect::StopWorkers{"stop"});
}

void Core::finish(const std::string& reason, RunOutcome outcome) {
  over_ = true;
  outcome.abort_workers = some_worker_is_stuck();
  effects_.push_back(effect::StopWorkers{reason});
  effects_.push_back(effect::Finish{std::move(outcome)});
}

void Core::note_idle_workers() {
  std::vector<int> idle;
  for (int index = 1; index <= num_workers_; ++index) {
    if (!workers_[static_cast<size_t>(index)].ever_leased) idle.push_back(index);
  }
  if (idle.empty() || most_ready_ == 0) return;
  log(Level::kInfo, "workers that never had a unit: workers={} most_units_at_once={}; fewer processes do as well",
      fmt::join(idle, ","), most_ready_);
}

bool Core::leased_to(const std::string& unit, int worker, int attempt) const {
  const auto found = jobs_.find(unit);
  if (found == jobs_.end()) return false;
  const Job& job = found->second;
  return job.state == Job::State::kLeased && job.worker == worker && job.attempt == attempt;
}

bool Core::running_anywhere() const {
  return std::any_of(jobs_.begin(), jobs_.end(),
                     [](const auto& entry) { return entry.second.state != Job::State::kReady; });
}

bool Core::may_try(const Job& job, int worker) const {
  if (!job.failed_on.contains(worker)) return true;
  for (int other = 1; other <= num_workers_; ++other) {
    const Worker& candidate = workers_[static_cast<size_t>(other)];
    if (!candidate.gone && !candidate.silent && !job.failed_on.contains(other)) return false;
  }
  return true;
}

/// Told to stop it would not hear it.
bool Core::some_worker_is_stuck() const {
  return std::any_of(workers_.begin() + 1, workers_.end(),
                     [](const Worker& worker) { return worker.silent && !worker.gone && !worker.stopped; });
}

std::string Core::name_of(int worker) const {
  if (worker == 0) return "the coordinator";
  if (workers_[static_cast<size_t>(worker)].info.host.empty()) return fmt::format("worker {}", worker);
  return fmt::format("worker {} ({})", worker, workers_[static_cast<size_t>(worker)].info.host);
}

std::optional<double> Core::Job::measured_seconds() const {
  if (!first || !(last->share > first->share)) return std::nullopt;
  return (last->at - first->at) / (last->share - first->share);
}

Core::Work Core::work() const {
  Scheduler corrected = scheduler_;
  for (const auto& [id, job] : jobs_) {
    if (job.state != Job::State::kLeased) continue;
    if (const auto seconds = job.measured_seconds())
      corrected.measured(job.unit.kind, job.worker, job.unit.cost, *seconds);
  }
  Work work;
  for (const auto& [kind, cost] : finished_cost_) work.done += corrected.predicted_seconds(kind, cost);
  work.total = work.done;
  for (const auto& [id, job] : jobs_) {
    const double seconds = corrected.predicted_seconds(job.unit.kind, job.unit.cost);
    work.total += seconds;
    if (job.state != Job::State::kReady) work.done += seconds * job.share_done();
    if (job.state == Job::State::kLeased) work.running += (work.running.empty() ? "" : ", ") + job.unit.label;
  }
  work.remaining_s = remaining_seconds(corrected);
  return work;
}

double Core::remaining_seconds(const Scheduler& scheduler) const {
  if (!scheduler.has_measured() && !jobs_.empty()) return std::numeric_limits<double>::infinity();
  std::vector<double> here_busy = {0}, busy, here_waiting, waiting;
  for (const auto& [id, job] : jobs_) {
    const bool here = job.unit.place == algorithms::Place::kCoordinator;
    const double seconds = scheduler.predicted_seconds(job.unit.kind, job.unit.cost);
    if (job.state == Job::State::kReady) {
      (here ? here_waiting : waiting).push_back(seconds);
    } else if (job.state == Job::State::kLeased) {
      const double elapsed = now_ - job.leased_at;
      double left = seconds - elapsed;
      if (const auto measured = job.measured_seconds())
        left = (1 - job.last->share) * *measured - (now_ - job.last->at);
      if (left < 0) left = elapsed / 10;  // overdue, for nobody knows how long: not "now" and not the prediction
      if (here) {
        here_busy[0] = left;
      } else {
        busy.push_back(left);
      }
    }
  }
  const auto workers = std::count_if(workers_.begin() + 1, workers_.end(),
                                     [](const Worker& worker) { return worker.greeted && !worker.gone; });
  busy.resize(std::max({busy.size(), static_cast<size_t>(workers), size_t{1}}));
  return std::max(seconds_to_finish(here_busy, here_waiting), seconds_to_finish(busy, waiting));
}

}  // namespace moraine::coordinator
