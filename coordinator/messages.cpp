#include "coordinator/messages.h"

#include "coordinator/verify.h"
#include "core/error.h"

namespace moraine::coordinator {
namespace {

using comm::MessageType;

Event result_event(int worker, const comm::Message& message) {
  const core::Json& body = message.body;
  const std::string unit = body.at("unit");
  const int attempt = body.at("attempt");
  const auto bad = [&](const std::string& kind, const std::string& text, const std::string& hint) {
    return event::Failed{worker, unit, attempt, {kind, text, hint}};
  };
  try {
    core::ArtefactPtr artefact =
        core::Artefact::parse(message.payload, body.at("artefact"), fmt::format("result of worker {}", worker));
    if (const auto where = first_non_finite(*artefact)) {
      return bad("numeric", "its result is not finite: " + *where,
                 "lower the learning rate, or look at the data of this unit");
    }
    return event::Finished{
        worker, unit, attempt, std::move(artefact), body.at("seconds"), body.value("stats", core::Json::object())};
  } catch (const core::Json::exception&) {
    throw;  // of the message, not of the artefact
  } catch (const std::exception& error) {
    return bad("artefact", error.what(), "the bytes were damaged on their way: check the worker's memory and network");
  }
}

WorkerInfo worker_info(const core::Json& body) {
  return {.host = body.at("host"),
          .pid = body.at("pid"),
          .threads = body.at("threads"),
          .device = body.at("device"),
          .version = body.at("version"),
          .recipe = body.value("recipe", "")};
}

}  // namespace

Event event_from(const comm::Envelope& envelope) {
  const int worker = envelope.peer;
  const core::Json& body = envelope.message.body;
  switch (envelope.message.type) {
    case MessageType::kHello:
      return event::Hello{worker, worker_info(body)};
    case MessageType::kPoll:
      return event::Poll{worker};
    case MessageType::kFetch:
    case MessageType::kMetrics:
      return event::Heard{worker};
    case MessageType::kResult:
      return result_event(worker, envelope.message);
    case MessageType::kFailed:
      return event::Failed{
          worker, body.at("unit"), body.at("attempt"), {body.at("kind"), body.at("text"), body.value("hint", "")}};
    case MessageType::kProgress:
      return event::Progress{worker, body.at("unit"), body.at("done"), body.at("total")};
    case MessageType::kStop:
      return event::Stopped{worker};
    case MessageType::kGone:
      return event::Gone{worker, body.at("reason"), body.value("code", 0), body.value("hint", "")};
    case MessageType::kRefuse:
    case MessageType::kLease:
    case MessageType::kArtefact:
      break;
  }
  throw core::UserError(
      fmt::format("message type {} is not for a coordinator", static_cast<int>(envelope.message.type)));
}

std::vector<core::metrics::Record> metrics_from(const core::Json& body) {
  std::vector<core::metrics::Record> records;
  for (const core::Json& record : body.at("records")) {
    if (record.at("value").is_null()) continue;
    records.push_back({record.at("unit"), record.at("key"), record.at("step"), record.at("value")});
  }
  return records;
}

}  // namespace moraine::coordinator
