#include "worker/members.h"

#include <ATen/Parallel.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "core/log.h"

namespace moraine::worker {
namespace {

constexpr std::chrono::milliseconds kIdleWait{250};

core::Bytes bytes_of(const core::Json& json) {
  const std::string text = json.dump(-1, ' ', false, core::Json::error_handler_t::replace);
  return comm::bytes_of(std::as_bytes(std::span(text)));
}

core::Json json_of(const core::Bytes& bytes) {
  const auto* text = reinterpret_cast<const char*>(bytes.span().data());
  const core::Json json = core::Json::parse(text, text + bytes.size(), nullptr, false);
  if (json.is_discarded()) throw GroupFailed("a member said something that is not JSON");
  return json;
}

/// How one member ended: "left" is a consequence of another member's end.
struct OwnEnd {
  std::string kind;  // done | stopped | failed | left
  core::ArtefactPtr artefact;
  FailureReport failure;
};

/// A unit's bits belong to the arithmetic it was planned for.
void check_arithmetic(const algorithms::Unit& unit, const std::string& here) {
  const core::Json compute = unit.spec.is_object() ? unit.spec.value("compute", core::Json::object()) : core::Json();
  if (!compute.is_object() || !compute.contains("arithmetic")) return;
  const auto planned = compute.at("arithmetic").get<std::string>();
  if (planned == here) return;
  throw core::UserError(
      fmt::format("worker: processors of different kinds in one run: {} is planned for '{}', this worker has '{}'",
                  unit.label, planned, here),
      "set workers.arithmetic=portable, or use machines of one kind (moraine env says which)");
}

OwnEnd execute_alone(const algorithms::Method& method, const algorithms::Unit& unit, int64_t attempt,
                     const WorkerOptions& options, UnitContext& context) {
  try {
    check_arithmetic(unit, options.arithmetic);
    options.faults.at_start(unit.label, attempt);
    return {"done", method.execute(unit, context), {}};
  } catch (const core::StopRequested& stopped) {
    return {"stopped", nullptr, {"", stopped.what(), ""}};
  } catch (const core::CommError&) {
    throw;
  } catch (const GroupFailed&) {
    return {"left", nullptr, describe_current_exception()};
  } catch (...) {
    return {"failed", nullptr, describe_current_exception()};
  }
}

core::Result<std::vector<core::Bytes>> exchange(comm::Group& group, const OwnEnd& own,
                                                std::chrono::milliseconds deadline) {
  return group.gather(
      bytes_of({{"end", own.kind}, {"kind", own.failure.kind}, {"text", own.failure.text}, {"hint", own.failure.hint}}),
      deadline);
}

/// The ends of all members. A member whose unit did not end well starts the group anew, which ends it for the others.
std::vector<core::Json> all_ends(comm::Group& group, OwnEnd& own, std::chrono::milliseconds deadline) {
  if (own.kind == "done") {
    if (auto ends = exchange(group, own, deadline); ends.ok())
      return std::vector<core::Json>(ends.value().size(), {{"end", "done"}});
    else
      own = {"left", nullptr, {"io", ends.error(), ""}};
  }
  group.renew();
  auto ends = exchange(group, own, deadline);
  if (!ends.ok()) {
    throw core::CommError("worker: a member of the group is lost: " + ends.error(),
                          "its unit runs again; look at that member's log");
  }
  std::vector<core::Json> all;
  for (const core::Bytes& bytes : ends.value()) all.push_back(json_of(bytes));
  return all;
}

class MemberServer {
 public:
  MemberServer(const algorithms::Method& method, const WorkerOptions& options, const std::atomic<int>& signals)
      : method_(method), options_(options), signals_(signals), artefacts_(options.artefact_cache_bytes) {}

  int run() {
    for (;;) {
      core::Bytes words;
      const auto came = options_.group->broadcast(words, kIdleWait);
      if (!came.ok()) throw core::CommError("worker: lost the leader of the group: " + came.error());
      if (!came.value()) continue;
      const core::Json call = json_of(words);
      if (call.contains("exit_code")) return call.at("exit_code");
      execute(call);
    }
  }

 private:
  void execute(const core::Json& lease) {
    const algorithms::Unit unit = algorithms::Unit::from_json(lease.at("unit"));
    const int64_t attempt = lease.at("attempt");
    MemberContext context(unit, attempt, options_, signals_, artefacts_);
    const UnitEnd end = execute_together(method_, unit, attempt, options_, context);
    if (end.kind == UnitEnd::Kind::kDone) return;
    artefacts_.clear();
    options_.objects->clear();
  }

  const algorithms::Method& method_;
  const WorkerOptions& options_;
  const std::atomic<int>& signals_;
  ChannelContext::ArtefactCache artefacts_;
};

}  // namespace

UnitEnd execute_together(const algorithms::Method& method, const algorithms::Unit& unit, int64_t attempt,
                         const WorkerOptions& options, UnitContext& context) {
  comm::Group& group = *options.group;
  OwnEnd own = execute_alone(method, unit, attempt, options, context);
  if (group.size() == 1) {
    return {own.kind == "done"      ? UnitEnd::Kind::kDone
            : own.kind == "stopped" ? UnitEnd::Kind::kStopped
                                    : UnitEnd::Kind::kFailed,
            own.artefact, own.failure};
  }
  const std::vector<core::Json> ends = all_ends(group, own, options.group_deadline);
  const auto first = [&](const char* kind) {
    return std::ranges::find_if(ends, [&](const core::Json& end) { return end.at("end") == kind; });
  };
  const auto report = [&](auto end) {
    const auto member = end - ends.begin();
    const std::string who = member == group.index() ? "" : fmt::format("member {} of the group: ", member);
    return FailureReport{end->at("kind"), who + end->at("text").template get<std::string>(), end->at("hint")};
  };
  if (const auto failed = first("failed"); failed != ends.end())
    return {UnitEnd::Kind::kFailed, nullptr, report(failed)};
  if (const auto stopped = first("stopped"); stopped != ends.end())
    return {UnitEnd::Kind::kStopped, nullptr, report(stopped)};
  if (const auto left = first("left"); left != ends.end()) return {UnitEnd::Kind::kFailed, nullptr, report(left)};
  return {UnitEnd::Kind::kDone, own.artefact, {}};
}

void call_members(comm::Group& group, const core::Json& lease) {
  if (group.size() == 1) return;
  core::Bytes words = bytes_of(lease);
  if (auto sent = group.broadcast(words, kIdleWait); !sent.ok())
    throw core::CommError("worker: the members of the group cannot be reached: " + sent.error());
}

void dismiss_members(comm::Group& group, int exit_code) {
  if (group.size() == 1) return;
  core::Bytes words = bytes_of({{"exit_code", exit_code}});
  if (auto sent = group.broadcast(words, kIdleWait); !sent.ok())
    core::log::warn("members of the group not told to end: {}", sent.error());
}

int serve_member(const algorithms::Method& method, const WorkerOptions& options, const std::atomic<int>& signals) {
  prepare_thread(options);
  return MemberServer(method, options, signals).run();
}

void prepare_thread(const WorkerOptions& options) {
  check_options(options);
  at::set_num_threads(options.threads);
  if (options.device == "cuda") c10::impl::getDeviceGuardImpl(c10::DeviceType::CUDA)->setDevice(options.cuda_device());
}

}  // namespace moraine::worker
