#include "coordinator/run_record.h"

#include "core/error.h"

namespace moraine::coordinator {
namespace {

UnitRecord unit_record(const core::Json& body, int epoch) {
  return {.unit = body.at("unit"),
          .kind = body.at("kind"),
          .label = body.at("label"),
          .artefact = body.at("artefact"),
          .host = body.at("host"),
          .worker = body.at("worker"),
          .attempt = body.at("attempt"),
          .epoch = epoch,
          .started = body.at("started"),
          .ended = body.at("ended"),
          .seconds = body.at("seconds"),
          .stats = body.at("stats")};
}

FailureRecord failure_record(const core::Json& body, int epoch) {
  return {.unit = body.at("unit"),
          .label = body.at("label"),
          .host = body.at("host"),
          .kind = body.at("kind"),
          .text = body.at("text"),
          .worker = body.at("worker"),
          .attempt = body.at("attempt"),
          .epoch = epoch,
          .time = body.at("time")};
}

}  // namespace

RunRecord read_run(const std::filesystem::path& root) {
  const RunLayout layout{root};
  if (!std::filesystem::exists(layout.recipe_json())) {
    throw core::UserError(fmt::format("coordinator: {} is no run directory (it has no recipe.json)", root.string()),
                          "name the directory of a run, for example runs/quickstart");
  }
  const std::vector<Record> records = read_journal(layout.journal());
  RunRecord run{.layout = layout,
                .recipe = core::read_json(layout.recipe_json()),
                .epochs = {},
                .units = {},
                .failures = {},
                .state = std::make_shared<AcceptedState>(layout, records)};
  for (const Record& record : records) {
    const core::Json& body = record.body;
    const int epoch = static_cast<int>(run.epochs.size());
    run.finished = record.type == RecordType::kDone;
    switch (record.type) {
      case RecordType::kEpoch:
        run.epochs.push_back({body.at("version"), body.at("processes"), body.at("time")});
        break;
      case RecordType::kAccept:
        std::erase_if(run.units, [&](const UnitRecord& unit) { return unit.unit == body.at("unit"); });
        run.units.push_back(unit_record(body, epoch));
        break;
      case RecordType::kFail:
        run.failures.push_back(failure_record(body, epoch));
        break;
      case RecordType::kStop:
      case RecordType::kDone:
        break;
    }
  }
  return run;
}

}  // namespace moraine::coordinator
