#include <map>

#include <CLI/CLI.hpp>

#include "cli/command.h"
#include "cli/output.h"
#include "cli/run_summary.h"
#include "coordinator/report/table.h"
#include "core/error.h"
#include "core/file.h"
#include "core/log.h"

namespace moraine::cli {
namespace {

namespace fs = std::filesystem;

// One line per unit: what is done, by whom, how long it took, and what is still to do.
core::Json list_units(const coordinator::RunRecord& run) {
  std::map<std::string, const coordinator::UnitRecord*> records;
  for (const auto& unit : run.units) records[unit.unit] = &unit;
  const algorithms::Plan plan = restore_method(run)->plan(*run.state);
  core::Json rows = core::Json::array();
  for (size_t i = 0; i < plan.finished.size(); ++i) {
    const algorithms::Unit& unit = plan.finished[i];
    const auto record = records.find(plan.finished_ids[i]);
    MORAINE_CHECK(record != records.end(), "unit {} is finished but not recorded", unit.label);
    const auto& r = *record->second;
    rows.push_back({{"unit", unit.label},
                    {"state", "done"},
                    {"worker", r.worker},
                    {"attempt", r.attempt},
                    {"seconds", r.seconds},
                    {"artefact", r.artefact.substr(0, 16)}});
  }
  for (const auto& unit : plan.pending)
    rows.push_back({{"unit", unit.label},
                    {"state", "to do"},
                    {"worker", nullptr},
                    {"attempt", nullptr},
                    {"seconds", nullptr},
                    {"artefact", nullptr}});
  return report::plain_table(run.layout.root.string(), {"unit", "state", "worker", "attempt", "seconds", "artefact"},
                             rows);
}

std::string state_of(const coordinator::RunRecord& run) {
  if (core::FileLock::is_held(run.layout.lock())) return "running";
  return run.finished ? "finished" : "unfinished";
}

core::Json describe(const std::string& name, const fs::path& path) {
  try {
    const coordinator::RunRecord run = coordinator::read_run(path);
    return from_stored(run, [&]() -> core::Json {
      return {{"run", name},
              {"method", run.recipe.at("method").get<std::string>()},
              {"state", state_of(run)},
              {"units", run.units.size()},
              {"starts", run.epochs.size()},
              {"failures", run.failures.size()}};
    });
  } catch (const core::Error& error) {  // one damaged run does not hide the others
    core::log::warn("run cannot be read: run={} reason={}", path.string(), error.what());
    return {{"run", name}, {"state", "unreadable"}};
  }
}

core::Json list_runs(const fs::path& parent) {
  core::Json rows = core::Json::array();
  std::map<std::string, fs::path> directories;
  for (const auto& entry : fs::directory_iterator(parent))
    if (fs::exists(entry.path() / "recipe.json")) directories[entry.path().filename().string()] = entry.path();
  for (const auto& [name, path] : directories) rows.push_back(describe(name, path));
  return report::plain_table(parent.string(), {"run", "method", "state", "units", "starts", "failures"}, rows);
}

void list(const fs::path& path, const std::string& format) {
  if (!fs::is_directory(path))
    throw core::UserError(fmt::format("cli: no directory {}", path.string()),
                          "name a run directory, or the directory that holds runs");
  core::Json table;
  if (fs::exists(path / "recipe.json")) {
    const auto run = coordinator::read_run(path);
    table = from_stored(run, [&] { return list_units(run); });
  } else {
    table = list_runs(path);
  }
  format == "json" ? print_json(table.at("rows")) : print(report::render_table(table, table_style(140)));
}

}  // namespace

void add_ls(CLI::App& app, int& exit_code) {
  auto* command = app.add_subcommand("ls", "Runs in a directory, or the units of one run");
  auto path = std::make_shared<std::string>("runs");
  auto format = std::make_shared<std::string>("text");
  command->add_option("path", *path, "Run directory, or a directory of runs")->capture_default_str();
  add_format_option(*command, *format);
  command->footer("Examples: moraine ls\n          moraine ls runs/quickstart --format json");
  command->callback([=, &exit_code] {
    list(*path, *format);
    exit_code = 0;
  });
}

}  // namespace moraine::cli
