#include "coordinator/coordinator.h"

#include <algorithm>
#include <ctime>

#include "coordinator/messages.h"
#include "coordinator/run_record.h"
#include "coordinator/verify.h"
#include "core/error.h"
#include "core/log.h"
#include "core/tensorboard.h"

namespace moraine::coordinator {
namespace {

using comm::MessageType;

constexpr std::chrono::milliseconds kWait{20};  // how late a signal or a unit run here may be noticed
constexpr double kTickSeconds = 0.25;
constexpr size_t kLongestFailureText = 4096;

double unix_time() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

/// Processor time of the calling thread.
double thread_seconds() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

Event run_unit(const Coordinator::Execute& execute, const algorithms::Unit& unit, int attempt) {
  const std::string id = unit.id();
  const auto start = std::chrono::steady_clock::now();
  try {
    core::ArtefactPtr artefact = execute(unit);
    if (const auto where = first_non_finite(*artefact)) throw core::NumericError("its result is not finite: " + *where);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return event::Finished{0, id, attempt, std::move(artefact), seconds, core::Json::object()};
  } catch (const core::StopRequested&) {
    return event::Stopped{0};
  } catch (const std::exception& error) {
    return event::Failed{0, id, attempt, problem_of(error)};
  }
}

}  // namespace

Coordinator::Coordinator(const RunDirectory& directory, comm::Channel& channel, Core::Planner plan, Execute execute,
                         Options options, const std::atomic<int>& signals)
    : layout_(directory.layout()),
      channel_(channel),
      execute_(std::move(execute)),
      options_([&] {
        options.clock = [this] { return now(); };
        return std::move(options);
      }()),
      signals_(signals),
      journal_(layout_.journal()),
      state_(layout_.artefacts(), journal_.take_records()),
      metrics_(core::metrics::open_jsonl(layout_.metrics())),
      curves_(core::metrics::open_tensorboard(layout_.tensorboard())),
      core_(channel.peers(), options_, std::move(plan), state_),
      progress_(options_.terminal, [this] { return now(); }) {
  state_.forget_damaged();
  state_.remember_plans();
}

Coordinator::~Coordinator() = default;

RunOutcome Coordinator::run() {
  try {
    journal_.append(RecordType::kEpoch,
                    {{"version", options_.version}, {"processes", channel_.peers() + 1}, {"time", unix_time()}});
  } catch (const std::exception& error) {
    apply(effect::StopWorkers{"failed"});
    return outcome_of(error);
  }
  handle(event::Start{});
  while (!outcome_) {
    receive();
    collect_unit_run_here();
    watch_clock();
  }
  progress_.clear();
  return *outcome_;
}

/// Feeds one event and everything that follows from it.
void Coordinator::handle(Event event) {
  events_.push_back(std::move(event));
  while (!events_.empty() && !outcome_) {
    const Event next = std::move(events_.front());
    events_.pop_front();
    try {
      for (const Effect& effect : core_.step(now(), next)) apply_or_break(effect);
    } catch (const std::exception& error) {
      core::log::error("the run cannot go on: {}", error.what());
      events_.push_back(event::Broken{outcome_of(error)});
    }
  }
}

/// An effect that fails must not take the ones behind it along: the state machine counts on all of them, and waits for
/// ever for what a lost lease or a lost end would have led to.
void Coordinator::apply_or_break(const Effect& effect) {
  try {
    std::visit([this](const auto& what) { apply(what); }, effect);
  } catch (const std::exception& error) {  // of the disk or ourselves, not of a unit
    core::log::error("the run cannot go on: {}", error.what());
    events_.push_back(event::Broken{outcome_of(error)});
  }
}

void Coordinator::apply(const effect::Lease& lease) {
  core::log::info("unit starts: unit={} worker={} attempt={}", lease.unit.label, lease.worker, lease.attempt);
  started_[lease.id] = unix_time();
  if (lease.worker == 0) {
    here_ = std::async(std::launch::async, run_unit, std::cref(execute_), lease.unit, lease.attempt);
  } else {
    send(lease.worker, {MessageType::kLease, {{"unit", lease.unit.to_json()}, {"attempt", lease.attempt}}, {}});
  }
}

void Coordinator::apply(const effect::Accept& accept) {
  const event::Finished& result = accept.result;
  const std::string& artefact = result.artefact->id();
  state_.store(*result.artefact);
  journal_.append(RecordType::kAccept, UnitRecord{.unit = result.unit,
                                                  .kind = accept.unit.kind,
                                                  .label = accept.unit.label,
                                                  .artefact = artefact,
                                                  .host = accept.host,
                                                  .worker = result.worker,
                                                  .attempt = result.attempt,
                                                  .started = started_[result.unit],
                                                  .ended = unix_time(),
                                                  .seconds = result.seconds,
                                                  .stats = result.stats});
  state_.accept(result.unit, artefact);
  started_.erase(result.unit);
  core::log::info("unit finished: unit={} worker={} seconds={:.1f} bytes={} artefact={}", accept.unit.label,
                  result.worker, result.seconds, result.artefact->bytes().size(), artefact.substr(0, 12));
  events_.push_back(event::Accepted{result.unit});
}

void Coordinator::apply(const effect::RecordFailure& failure) {
  journal_.append(RecordType::kFail, FailureRecord{.unit = failure.id,
                                                   .kind = failure.unit.kind,
                                                   .label = failure.unit.label,
                                                   .host = failure.host,
                                                   .problem = failure.problem.kind,
                                                   .text = failure.problem.text.substr(0, kLongestFailureText),
                                                   .worker = failure.worker,
                                                   .attempt = failure.attempt,
                                                   .started = started_[failure.id],
                                                   .time = unix_time()});
}

void Coordinator::apply(const effect::Refuse& refuse) {
  core::log::error("worker refused: worker={} code={} reason={}", refuse.worker, refuse.code, refuse.text);
  send(refuse.worker,
       {MessageType::kRefuse, {{"code", refuse.code}, {"text", refuse.text}, {"hint", refuse.hint}}, {}});
}

void Coordinator::apply(const effect::StopWorkers& stop) {
  for (int worker = 1; worker <= channel_.peers(); ++worker) {
    const auto sent = channel_.send(worker, {MessageType::kStop, {{"reason", stop.reason}}, {}});
    if (!sent.ok())
      core::log::debug("a worker left before it was told to stop: worker={} reason={}", worker, sent.error());
  }
}

void Coordinator::apply(const effect::Finish& finish) {
  outcome_ = finish.outcome;
  try {
    const EpochEnd end{.time = unix_time(), .coordinating_s = thread_seconds(), .planning_s = core_.planning_seconds()};
    core::Json body = end;
    if (outcome_->exit_code != core::kExitOk) body["reason"] = outcome_->message.substr(0, kLongestFailureText);
    journal_.append(outcome_->exit_code == core::kExitOk ? RecordType::kDone : RecordType::kStop, body);
  } catch (const std::exception& error) {
    core::log::error("the end of the run could not be recorded: {}", error.what());
    if (outcome_->exit_code == core::kExitOk) outcome_ = outcome_of(error);
  }
}

void Coordinator::receive() {
  auto received = channel_.receive(kWait);
  // A signal to the whole job reaches workers too; what they say about it must find the request noted.
  if (signals_ > 0 && !std::exchange(stop_passed_on_, true)) {
    core::log::info("stop requested: waiting for checkpoints, longest_s={:.0f}", options_.stop_grace_s);
    handle(event::StopRequested{});
  }
  if (outcome_) return;
  if (!received.ok()) {
    return handle(event::Broken{{core::kExitIo, received.error(), "run the same command again to continue"}});
  }
  if (!received.value()) return;
  const comm::Envelope envelope = std::move(*received.value());
  const auto malformed = [&](const std::exception& error) {
    apply(effect::Refuse{envelope.peer, core::kExitInternal,
                         fmt::format("message type {}: {}", static_cast<int>(envelope.message.type), error.what())});
    handle(event::Gone{envelope.peer, "it sent a malformed message"});
  };
  try {
    Event event = event_from(envelope);
    if (envelope.message.type == MessageType::kFetch) answer_fetch(envelope.peer, envelope.message.body);
    if (envelope.message.type == MessageType::kMetrics) {
      for (const auto& record : metrics_from(envelope.message.body)) {
        metrics_->record(record);
        curves_->record(record);
      }
    }
    handle(std::move(event));
  } catch (const core::Json::exception& error) {
    malformed(error);
  } catch (const core::UserError& error) {
    malformed(error);
  } catch (const std::exception& error) {
    core::log::error("the run cannot go on: {}", error.what());
    handle(event::Broken{outcome_of(error)});
  }
}

void Coordinator::answer_fetch(int worker, const core::Json& body) {
  const std::string id = body.at("artefact");
  try {
    send(worker, {MessageType::kArtefact, {{"artefact", id}}, state_.artefact(id)->bytes()});
  } catch (const core::Json::exception&) {
    throw;
  } catch (const std::exception& error) {
    core::log::error("an artefact cannot be sent: worker={} artefact={} reason={}", worker, id, error.what());
    send(worker, {MessageType::kArtefact, {{"artefact", id}, {"error", error.what()}}, {}});
  }
}

void Coordinator::collect_unit_run_here() {
  if (here_.valid() && here_.wait_for(std::chrono::seconds(0)) == std::future_status::ready) handle(here_.get());
}

void Coordinator::watch_clock() {
  if (outcome_ || now() - last_tick_ < kTickSeconds) return;
  last_tick_ = now();
  handle(event::Tick{});
  const Core::Work work = core_.work();
  shown_ = std::max(shown_, work.total > 0 ? work.done / work.total : 0);
  progress_.update(shown_, work.remaining_s, work.running);
}

void Coordinator::send(int worker, comm::Message message) {
  const auto sent = channel_.send(worker, std::move(message));
  if (!sent.ok()) events_.push_back(event::Gone{worker, sent.error()});
}

double Coordinator::now() const {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - origin_).count();
}

}  // namespace moraine::coordinator
