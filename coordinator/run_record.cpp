#include "coordinator/run_record.h"

#include <map>

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

namespace {

constexpr const char* kRepair =
    "`moraine run` with the recipe (a copy is recipe.yaml in the directory) and --run-dir writes it again; what is "
    "finished is kept";

core::Json read_recipe(const std::filesystem::path& path) {
  core::Json recipe;
  try {
    recipe = core::read_json(path);
  } catch (const core::UserError& error) {
    throw core::UserError(fmt::format("coordinator: {} cannot be read: {}", path.string(), error.what()), kRepair);
  }
  for (const char* key : {"name", "method"}) {
    if (!recipe.is_object() || !recipe.contains(key) || !recipe[key].is_string())
      throw core::UserError(fmt::format("coordinator: {} is damaged: it has no text '{}'", path.string(), key),
                            kRepair);
  }
  return recipe;
}

void take(const Record& record, RunRecord& run, std::map<std::string, size_t>& last) {
  const core::Json& body = record.body;
  const int epoch = static_cast<int>(run.epochs.size());
  run.finished = record.type == RecordType::kDone;
  switch (record.type) {
    case RecordType::kEpoch:
      run.epochs.push_back({body.at("version"), body.at("processes"), body.at("time")});
      break;
    case RecordType::kAccept:
      run.units.push_back(body);
      run.units.back().epoch = epoch;
      last[run.units.back().unit] = run.units.size() - 1;
      break;
    case RecordType::kFail:
      run.failures.push_back(body);
      run.failures.back().epoch = epoch;
      break;
    case RecordType::kStop:
    case RecordType::kDone: {
      const EpochEnd end = body;
      run.ends = {end.time, run.ends.coordinating_s + end.coordinating_s, run.ends.planning_s + end.planning_s};
      break;
    }
  }
}

}  // namespace

RunRecord read_run(const std::filesystem::path& root) {
  const RunLayout layout{root};
  if (!std::filesystem::exists(layout.recipe_json())) {
    throw core::UserError(fmt::format("coordinator: {} is no run directory (it has no recipe.json)", root.string()),
                          "name the directory of a run, for example runs/quickstart");
  }
  RunRecord run;
  run.layout = layout;
  run.recipe = read_recipe(layout.recipe_json());
  const std::vector<Record> records = read_journal(layout.journal());
  std::map<std::string, size_t> last;  // place of a unit's last record
  try {
    run.state = std::make_shared<AcceptedState>(layout.artefacts(), records);
    for (const Record& record : records) take(record, run, last);
  } catch (const core::Json::exception& error) {
    throw core::IoError(
        fmt::format("coordinator: {} holds a record that cannot be read: {}", layout.journal().string(), error.what()),
        "another version of Moraine wrote it: use that one");
  }
  std::vector<UnitRecord> units;
  for (size_t i = 0; i < run.units.size(); ++i) {
    if (last.at(run.units[i].unit) == i) units.push_back(std::move(run.units[i]));
  }
  run.units = std::move(units);
  return run;
}

}  // namespace moraine::coordinator
