#include "worker/serve.h"

#include <array>
#include <chrono>

#include <ATen/Parallel.h>
#include <sched.h>
#include <unistd.h>

#include "core/error.h"
#include "core/log.h"
#include "worker/failure.h"
#include "worker/members.h"

namespace moraine::worker {
namespace {

using comm::MessageType;

constexpr std::chrono::milliseconds kIdleWait{250};

std::string host_name() {
  std::array<char, 256> name{};
  if (gethostname(name.data(), name.size() - 1) != 0) return "unknown";
  return name.data();
}

int usable_processors() {
  cpu_set_t set;
  CPU_ZERO(&set);
  return sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
}

class Server {
 public:
  Server(comm::Channel& channel, const algorithms::Method& method, const WorkerOptions& options,
         const std::atomic<int>& signals)
      : channel_(channel),
        method_(method),
        options_(options),
        signals_(signals),
        artefacts_(options.artefact_cache_bytes) {}

  int run() {
    const int code = converse();
    dismiss_members(*options_.group, code);
    return code;
  }

 private:
  int converse() {
    send(MessageType::kHello, {{"name", options_.name},
                               {"host", host_name()},
                               {"pid", getpid()},
                               {"threads", options_.threads},
                               {"device", options_.device},
                               {"version", options_.version},
                               {"recipe", options_.recipe}});
    send(MessageType::kPoll, core::Json::object());
    while (true) {
      if (signals_.load() > 0) return stop("");
      const std::optional<comm::Message> message = receive_or_throw(channel_, kIdleWait);
      if (!message) continue;
      switch (message->type) {
        case MessageType::kLease:
          remove_accepted_checkpoints();
          if (const std::optional<int> code = lease(message->body)) return *code;
          break;
        case MessageType::kStop: {
          const std::string reason = message->body.value("reason", "");
          if (reason == "done") remove_accepted_checkpoints();
          return stop("", reason == "stop" ? core::kExitRequeue : core::kExitOk);
        }
        case MessageType::kRefuse:
          core::log::error("refused by the coordinator: {}; {}", message->body.value("text", ""),
                           message->body.value("hint", ""));
          return message->body.value("code", static_cast<int>(core::kExitUser));
        default:
          throw core::CommError(
              fmt::format("worker: unexpected message {} while idle", static_cast<int>(message->type)));
      }
    }
  }

  void send(MessageType type, core::Json body, core::Bytes payload = {}) {
    send_or_throw(channel_, {type, std::move(body), std::move(payload)});
  }

  /// Says the last word. The coordinator may have left already, which is no failure any more.
  int stop(const std::string& unit_id, int code = core::kExitRequeue) {
    const auto sent = channel_.send(0, {MessageType::kStop, {{"unit", unit_id}}, {}});
    if (!sent.ok()) core::log::debug("the coordinator did not wait for the last message: {}", sent.error());
    return code;
  }

  /// Executes one unit and reports it. An exit code when the worker is to end.
  std::optional<int> lease(const core::Json& body) {
    const algorithms::Unit unit = algorithms::Unit::from_json(body.at("unit"));
    const std::string id = unit.id();
    const int64_t attempt = body.at("attempt");
    core::log::debug("unit started: unit={} attempt={}", unit.label, attempt);
    ChannelContext context(unit, attempt, options_, signals_, channel_, artefacts_);
    const auto start = std::chrono::steady_clock::now();
    call_members(*options_.group, body);
    const UnitEnd end = execute_together(method_, unit, attempt, options_, context);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (end.kind != UnitEnd::Kind::kDone) forget_objects(end);
    context.flush();
    switch (end.kind) {
      case UnitEnd::Kind::kDone:
        send(MessageType::kResult,
             {{"unit", id},
              {"attempt", attempt},
              {"artefact", end.artefact->id()},
              {"seconds", seconds},
              {"stats", context.stats()}},
             end.artefact->bytes());
        accepted_checkpoints_ = context.checkpoints();
        core::log::debug("unit finished: unit={} seconds={:.1f} bytes={}", unit.label, seconds,
                         end.artefact->bytes().size());
        break;
      case UnitEnd::Kind::kStopped:
        core::log::info("unit stopped: unit={} reason={}", unit.label, end.failure.text);
        return stop(id, exit_code_of(context));
      case UnitEnd::Kind::kFailed:
        core::log::error("unit failed: unit={} attempt={} kind={} reason={}", unit.label, attempt, end.failure.kind,
                         end.failure.text);
        send(MessageType::kFailed, {{"unit", id},
                                    {"attempt", attempt},
                                    {"kind", end.failure.kind},
                                    {"text", end.failure.text},
                                    {"hint", end.failure.hint}});
        break;
    }
    if (context.stop_reason() || signals_.load() > 0) return stop("", exit_code_of(context));
    send(MessageType::kPoll, core::Json::object());
    return std::nullopt;
  }

  /// After a failure members may hold different things, and after one of memory they hold too many.
  void forget_objects(const UnitEnd& end) {
    if (end.failure.kind != "memory" && options_.group->size() == 1) return;
    artefacts_.clear();
    options_.objects->clear();
  }

  /// A run that has failed ends its workers with 0: the coordinator's exit code speaks for it.
  int exit_code_of(const ChannelContext& context) const {
    return context.stop_reason().value_or("stop") == "stop" ? core::kExitRequeue : core::kExitOk;
  }

  void remove_accepted_checkpoints() {
    std::error_code ignored;  // a file that stays costs space, nothing else
    for (const auto& path : accepted_checkpoints_) std::filesystem::remove(path, ignored);
    accepted_checkpoints_.clear();
  }

  comm::Channel& channel_;
  const algorithms::Method& method_;
  const WorkerOptions& options_;
  const std::atomic<int>& signals_;
  ChannelContext::ArtefactCache artefacts_;
  std::vector<std::filesystem::path> accepted_checkpoints_;
};

}  // namespace

int serve(comm::Channel& channel, const algorithms::Method& method, const WorkerOptions& options,
          const std::atomic<int>& signals) {
  prepare_thread(options);
  const int wanted = options.threads * options.workers_on_host, processors = usable_processors();
  if (wanted > processors) {
    core::log::warn("more threads than processors, expect to be slow: threads={} workers_on_host={} processors={}",
                    options.threads, options.workers_on_host, processors);
  }
  return Server(channel, method, options, signals).run();
}

}  // namespace moraine::worker
