#include "coordinator/core.h"

#include <algorithm>
#include <limits>

#include <fmt/ranges.h>

#include "core/error.h"

namespace moraine::coordinator {

using core::log::Level;

int exit_code_of(const std::string& problem_kind) {
  static const std::map<std::string, int> codes = {
      {"user", core::kExitUser},   {"io", core::kExitIo},   {"memory", core::kExitIo},
      {"artefact", core::kExitIo}, {"gone", core::kExitIo}, {"numeric", core::kExitNumeric},
  };
  const auto found = codes.find(problem_kind);
  return found == codes.end() ? core::kExitInternal : found->second;
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
  replan();
}

void Core::on(const event::Hello& hello) {
  Worker& worker = workers_[static_cast<size_t>(hello.worker)];
  if (hello.info.version != options_.version) {
    effects_.push_back(
        effect::Refuse{hello.worker, core::kExitUser,
                       fmt::format("the coordinator is version {}, worker {} on {} is version {}", options_.version,
                                   hello.worker, hello.info.host, hello.info.version)});
    on(event::Gone{hello.worker, "it is of another version"});
    return;
  }
  worker.greeted = true;
  worker.info = hello.info;
  log(Level::kInfo, "worker joined: worker={} host={} pid={} threads={} device={}", hello.worker, hello.info.host,
      hello.info.pid, hello.info.threads, hello.info.device);
}

void Core::on(const event::Poll& poll) {
  Worker& worker = workers_[static_cast<size_t>(poll.worker)];
  if (worker.gone) return;  // it was refused and has not read that yet
  if (!worker.greeted) {
    effects_.push_back(effect::Refuse{poll.worker, core::kExitInternal, "the first message of a worker must be hello"});
    on(event::Gone{poll.worker, "it polled before it said hello"});
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
  job.state = Job::State::kStoring;
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
  jobs_.erase(accepted.unit);
  if (ending_ || failure_) return;
  replan();
  if (const auto again = jobs_.find(accepted.unit); again != jobs_.end()) {
    begin_ending({core::kExitInternal,
                  fmt::format("coordinator: the plan asks again for a finished unit: {}", again->second.unit.label),
                  "this is a bug in Moraine: please report it with this message"});
  }
}

void Core::on(const event::Stopped& stopped) {
  Worker& worker = workers_[static_cast<size_t>(stopped.worker)];
  const std::string unit = std::exchange(worker.unit, "");
  if (!unit.empty()) jobs_.at(unit).state = Job::State::kReady;  // no failure: its checkpoint waits for the next taker
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
    if (worker.unit.empty() || now_ - worker.heard_at <= options_.stall_s) continue;
    worker.silent = true;
    withdraw_unit_of(
        index,
        {"gone", fmt::format("worker {} gave no sign of life for {:.0f} s", name_of(index), options_.stall_s), ""});
  }
}

void Core::replan() {
  algorithms::Plan plan = plan_(state_);
  finished_.clear();
  for (const auto& unit : plan.finished) finished_.push_back({"", unit.kind, unit.cost});
  std::map<std::string, algorithms::Unit> pending;
  for (auto& unit : plan.pending) {
    std::string id = unit.id();
    pending.emplace(std::move(id), std::move(unit));
  }
  std::erase_if(jobs_, [&](const auto& entry) {
    return entry.second.state == Job::State::kReady && !pending.contains(entry.first);
  });
  size_t worker_units = 0;
  for (auto& [id, unit] : pending) {
    if (unit.place == algorithms::Place::kWorker) ++worker_units;
    if (!jobs_.contains(id)) jobs_[id].unit = std::move(unit);
  }
  most_ready_ = std::max(most_ready_, worker_units);
}

void Core::dispatch() {
  if (ending_) {
    const bool all_stopped =
        std::all_of(workers_.begin() + 1, workers_.end(),
                    [](const Worker& worker) { return !worker.greeted || worker.gone || worker.stopped; }) &&
        workers_[0].unit.empty();
    if (!all_stopped && now_ < ending_->deadline) return;
    RunOutcome outcome = ending_->outcome;
    outcome.abort_workers = !all_stopped;
    if (!all_stopped) log(Level::kWarn, "some workers did not stop in time: grace_s={:.0f}", options_.stop_grace_s);
    over_ = true;
    effects_.push_back(effect::Finish{std::move(outcome)});
    return;
  }
  if (failure_) {
    if (!running_anywhere()) finish("failed", *failure_);
    return;
  }
  if (jobs_.empty()) {
    note_idle_workers();
    finish("done", {});
    return;
  }
  std::vector<Candidate> ready;
  for (const auto& [id, job] : jobs_) {
    if (job.state == Job::State::kReady) ready.push_back({id, job.unit.kind, job.unit.cost + job.unit.follows});
  }
  scheduler_.sort(ready);
  std::vector<int> waiting;
  bool any_alive = false;
  for (int index = 1; index <= num_workers_; ++index) {
    const Worker& worker = workers_[static_cast<size_t>(index)];
    if (worker.waiting) waiting.push_back(index);
    any_alive = any_alive || (!worker.gone && !worker.silent);
  }
  scheduler_.sort(waiting);
  if (!any_alive) {
    const bool stopped =
        std::any_of(workers_.begin() + 1, workers_.end(), [](const Worker& worker) { return worker.stopped; });
    begin_ending({stopped ? core::kExitRequeue : core::kExitIo, "coordinator: all workers have left",
                  "run the same command again to continue"});
    return dispatch();
  }
  for (const Candidate& candidate : ready) {
    const Job& job = jobs_.at(candidate.id);
    if (job.unit.place == algorithms::Place::kCoordinator) {
      if (workers_[0].unit.empty()) lease(0, candidate.id);
      continue;
    }
    const auto taker = std::find_if(waiting.begin(), waiting.end(), [&](int worker) { return may_try(job, worker); });
    if (taker == waiting.end()) continue;
    lease(*taker, candidate.id);
    waiting.erase(taker);
  }
  const bool all_asked = std::all_of(workers_.begin() + 1, workers_.end(), [](const Worker& worker) {
    return worker.gone || worker.waiting || !worker.unit.empty();
  });
  if (!noted_idle_ && all_asked && !waiting.empty() && most_ready_ < workers_.size() - 1) {
    noted_idle_ = true;
    log(Level::kInfo, "more workers than units that can run now: nothing to do yet for workers={} units={}",
        fmt::join(waiting, ","), most_ready_);
  }
}

void Core::lease(int index, const std::string& unit) {
  Job& job = jobs_.at(unit);
  Worker& worker = workers_[static_cast<size_t>(index)];
  job.state = Job::State::kLeased;
  job.worker = index;
  job.leased_at = now_;
  job.first = job.last = std::nullopt;
  worker.unit = unit;
  worker.waiting = false;
  worker.ever_leased = true;
  worker.heard_at = now_;
  effects_.push_back(effect::Lease{index, job.unit, job.attempt});
}

void Core::withdraw_unit_of(int index, const Problem& problem) {
  const std::string unit = std::exchange(workers_[static_cast<size_t>(index)].unit, "");
  if (!unit.empty()) fail_attempt(unit, problem);
}

void Core::fail_attempt(const std::string& unit, const Problem& problem) {
  Job& job = jobs_.at(unit);
  const int attempt = job.attempt;
  effects_.push_back(effect::RecordFailure{job.unit, job.worker, workers_[static_cast<size_t>(job.worker)].info.host,
                                           attempt, problem});
  job.failed_on.insert(job.worker);
  job.state = Job::State::kReady;
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

std::string Core::name_of(int worker) const {
  if (worker == 0) return "the coordinator";
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
  for (const Candidate& unit : finished_) work.done += corrected.predicted_seconds(unit.kind, unit.cost);
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
