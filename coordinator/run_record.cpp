#include "coordinator/run_record.h"

#include "core/error.h"

namespace moraine::coordinator {
void to_json(core::Json& json, const FailureRecord& record) {
  json = {{"unit", record.unit},       {"unit_kind", record.kind},  {"label", record.label},  {"worker", record.worker},
          {"host", record.host},       {"attempt", record.attempt}, {"kind", record.problem}, {"text", record.text},
          {"started", record.started}, {"time", record.time}};
}

void from_json(const core::Json& json, FailureRecord& record) {
  json.at("unit").get_to(record.unit);
  record.kind = json.value("unit_kind", "");
  json.at("label").get_to(record.label);
  json.at("worker").get_to(record.worker);
  json.at("host").get_to(record.host);
  json.at("attempt").get_to(record.attempt);
  json.at("kind").get_to(record.problem);
  json.at("text").get_to(record.text);
  json.at("time").get_to(record.time);
  record.started = json.value("started", record.time);
}

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
                .state = std::make_shared<AcceptedState>(layout.artefacts(), records)};
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
        run.units.push_back(body);
        run.units.back().epoch = epoch;
        break;
      case RecordType::kFail:
        run.failures.push_back(body);
        run.failures.back().epoch = epoch;
        break;
      case RecordType::kStop:
      case RecordType::kDone:
        break;
    }
  }
  return run;
}

}  // namespace moraine::coordinator
