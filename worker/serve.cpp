#include "worker/serve.h"

#include <array>
#include <chrono>
#include <new>
#include <system_error>

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#include <sched.h>
#include <unistd.h>

#include "core/error.h"
#include "core/log.h"

namespace moraine::worker {
namespace {

using comm::MessageType;

constexpr std::chrono::milliseconds kIdleWait{250};
constexpr size_t kMaxFailureText = 4096;

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

std::string first_line(const std::string& text) { return text.substr(0, std::min(text.find('\n'), kMaxFailureText)); }

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
    send(MessageType::kHello, {{"name", options_.name},
                               {"host", host_name()},
                               {"pid", getpid()},
                               {"threads", options_.threads},
                               {"device", options_.device},
                               {"version", MORAINE_VERSION}});
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
          core::log::error("refused by the coordinator: {}", message->body.value("text", ""));
          return message->body.value("code", static_cast<int>(core::kExitUser));
        default:
          throw core::CommError(
              fmt::format("worker: unexpected message {} while idle", static_cast<int>(message->type)));
      }
    }
  }

 private:
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
    core::log::info("unit started: unit={} attempt={}", unit.label, attempt);
    ChannelContext context(unit, attempt, options_, signals_, channel_, artefacts_);
    try {
      const auto start = std::chrono::steady_clock::now();
      options_.faults.at_start(unit.label, attempt);
      const core::ArtefactPtr artefact = method_.execute(unit, context);
      const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      context.flush();
      send(MessageType::kResult,
           {{"unit", id},
            {"attempt", attempt},
            {"artefact", artefact->id()},
            {"seconds", seconds},
            {"stats", context.stats()}},
           artefact->bytes());
      accepted_checkpoints_ = context.checkpoints();
      core::log::info("unit finished: unit={} seconds={:.1f} bytes={}", unit.label, seconds, artefact->bytes().size());
    } catch (const core::StopRequested& stopped) {
      context.flush();
      core::log::info("unit stopped: unit={} reason={}", unit.label, stopped.what());
      return stop(id, exit_code_of(context));
    } catch (const core::CommError&) {
      throw;
    } catch (...) {
      report_failure(context, id, attempt, describe_current_exception());
    }
    if (context.stop_reason() || signals_.load() > 0) return stop("", exit_code_of(context));
    send(MessageType::kPoll, core::Json::object());
    return std::nullopt;
  }

  /// A run that has failed ends its workers with 0: the coordinator's exit code speaks for it.
  int exit_code_of(const ChannelContext& context) const {
    return context.stop_reason().value_or("stop") == "stop" ? core::kExitRequeue : core::kExitOk;
  }

  void report_failure(ChannelContext& context, const std::string& id, int64_t attempt, const FailureReport& failure) {
    core::log::error("unit failed: unit={} attempt={} kind={} reason={}", context.unit().label, attempt, failure.kind,
                     failure.text);
    if (failure.kind == "memory") {
      artefacts_.clear();
      options_.objects->clear();
    }
    context.flush();
    send(MessageType::kFailed,
         {{"unit", id}, {"attempt", attempt}, {"kind", failure.kind}, {"text", failure.text}, {"hint", failure.hint}});
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

FailureReport describe_current_exception() {
  const char* memory_hint = "lower train.micro_batch_size, or run fewer workers on this host";
  try {
    throw;
  } catch (const core::Error& error) {
    const char* kind = error.exit_code() == core::kExitUser      ? "user"
                       : error.exit_code() == core::kExitIo      ? "io"
                       : error.exit_code() == core::kExitNumeric ? "numeric"
                                                                 : "internal";
    return {kind, std::string(error.what()).substr(0, kMaxFailureText), error.hint()};
  } catch (const std::bad_alloc&) {
    return {"memory", "out of memory", memory_hint};
  } catch (const c10::Error& error) {
    // The CPU allocator reports exhaustion as a plain Error.
    const std::string text = first_line(error.what_without_backtrace());
    const bool memory = dynamic_cast<const c10::OutOfMemoryError*>(&error) != nullptr ||
                        text.find("DefaultCPUAllocator") != std::string::npos;
    if (memory) return {"memory", text, memory_hint};
    return {"internal", text, "this is a bug in Moraine: please report it with this message"};
  } catch (const std::system_error& error) {
    return {"io", first_line(error.what()), "check disk, permissions and limits of this host"};
  } catch (const std::exception& error) {
    return {"internal", first_line(error.what()), "this is a bug in Moraine: please report it with this message"};
  } catch (...) {
    return {"internal", "something that is no std::exception was thrown",
            "this is a bug in Moraine: please report it with this message"};
  }
}

int serve(comm::Channel& channel, const algorithms::Method& method, const WorkerOptions& options,
          const std::atomic<int>& signals) {
  check_options(options);
  at::set_num_threads(options.threads);
  const int wanted = options.threads * options.workers_on_host, processors = usable_processors();
  if (wanted > processors) {
    core::log::warn("more threads than processors, expect to be slow: threads={} workers_on_host={} processors={}",
                    options.threads, options.workers_on_host, processors);
  }
  return Server(channel, method, options, signals).run();
}

}  // namespace moraine::worker
