#include "cli/run_summary.h"

#include <algorithm>
#include <map>

#include "algorithms/register.h"
#include "cli/version.h"
#include "coordinator/report/html.h"
#include "core/error.h"
#include "core/file.h"

namespace moraine::cli {
namespace {

constexpr const char* kPlanFile = "inputs.json";

core::Json read_plan_file(const std::filesystem::path& run_directory) {
  const std::filesystem::path path = run_directory / kPlanFile;
  core::Json plan = core::read_json(path);
  const auto is_value = [](const core::Json& value) {
    return value.is_object() && value.size() == 3 && value.contains("path") && value["path"].is_string() &&
           value.contains("origin") && value["origin"].is_string() && value.contains("value") &&
           value["value"].is_string();
  };
  if (plan.is_object() && plan.contains("inputs") && plan.contains("resolved") && plan["resolved"].is_array() &&
      std::all_of(plan["resolved"].begin(), plan["resolved"].end(), is_value))
    return plan;
  throw core::UserError(fmt::format("cli: {} is damaged: it has no inputs or no resolved recipe", path.string()),
                        "`moraine run` with the recipe and this --run-dir writes it again");
}

std::string worker_name(int worker) { return worker == 0 ? "coordinator" : fmt::format("worker {}", worker); }

core::Json timeline(const algorithms::Plan& plan, const coordinator::RunRecord& run) {
  core::Json units = core::Json::array(), restarts = core::Json::array(), notes = core::Json::array();
  if (run.epochs.empty()) return {{"title", "Units over workers"}, {"units", units}, {"notes", notes}};
  // A run that was continued much later would be drawn mostly empty, so the pauses between starts are cut out.
  std::map<int, double> shift;
  double clock = 0;
  for (size_t e = 0; e < run.epochs.size(); ++e) {
    const int epoch = static_cast<int>(e) + 1;
    shift[epoch] = run.epochs[e].time - clock;
    if (e > 0) restarts.push_back(clock);
    double end = run.epochs[e].time;
    for (const auto& unit : run.units)
      if (unit.epoch == epoch) end = std::max(end, unit.ended);
    for (const auto& failure : run.failures)
      if (failure.epoch == epoch) end = std::max(end, failure.time);
    clock += end - run.epochs[e].time;
  }
  std::map<std::string, const coordinator::UnitRecord*> records;
  for (const auto& unit : run.units) records[unit.unit] = &unit;
  for (const std::string& id : plan.finished_ids) {
    const auto it = records.find(id);
    if (it == records.end()) continue;
    const coordinator::UnitRecord& r = *it->second;
    units.push_back({{"label", r.label},
                     {"kind", r.kind},
                     {"worker", worker_name(r.worker)},
                     {"start_s", r.started - shift[r.epoch]},
                     {"end_s", r.ended - shift[r.epoch]},
                     {"attempt", r.attempt},
                     {"status", "done"}});
  }
  for (const auto& failure : run.failures)
    units.push_back({{"label", failure.label},
                     {"kind", failure.kind},
                     {"worker", worker_name(failure.worker)},
                     {"start_s", failure.started - shift[failure.epoch]},
                     {"end_s", failure.time - shift[failure.epoch]},
                     {"attempt", failure.attempt},
                     {"status", "failed"}});
  if (run.epochs.size() > 1)
    notes.push_back(fmt::format("{} starts; pauses between them are cut out", run.epochs.size()));
  if (run.ends.coordinating_s > 0)
    notes.push_back(fmt::format("the coordinator itself: {:.1f} s of processor time, {:.1f} s of it for plans",
                                run.ends.coordinating_s, run.ends.planning_s));
  return {{"title", "Units over workers"},
          {"units", units},
          {"restarts", restarts},
          {"coordinating_s", run.ends.coordinating_s},
          {"notes", notes}};
}

core::Json timing(const algorithms::Plan& plan, const coordinator::RunRecord& run) {
  std::map<std::string, const coordinator::UnitRecord*> records;
  for (const auto& unit : run.units) records[unit.unit] = &unit;
  std::map<std::string, double> seconds;
  for (const std::string& id : plan.finished_ids)
    if (const auto it = records.find(id); it != records.end()) seconds[it->second->kind] += it->second->seconds;
  core::Json out = core::Json::array();
  for (const auto& [kind, value] : seconds) out.push_back({{"label", kind}, {"seconds", value}});
  return out;
}

// What training cost, by the second part of the units' labels ("train/<adapter>/..."), as their workers measured it.
std::optional<core::Json> training_costs(const algorithms::Plan& plan, const coordinator::RunRecord& run) {
  struct Cost {
    int64_t units = 0, tokens = 0, peak = 0, device = 0, optimizer = 0;
    double seconds = 0;
  };
  std::map<std::string, const coordinator::UnitRecord*> records;
  for (const auto& unit : run.units) records[unit.unit] = &unit;
  std::vector<std::string> order;
  std::map<std::string, Cost> costs;
  for (const std::string& id : plan.finished_ids) {
    const auto it = records.find(id);
    const core::Json stats = it == records.end() ? core::Json() : it->second->stats;
    if (!stats.is_object() || stats.value("trained_tokens", int64_t{0}) <= 0) continue;
    std::string name = it->second->label.substr(it->second->label.find('/') + 1);
    name = name.substr(0, name.find('/'));
    if (!costs.contains(name)) order.push_back(name);
    Cost& cost = costs[name];
    ++cost.units;
    cost.tokens += stats.value("trained_tokens", int64_t{0});
    cost.seconds += stats.value("train_seconds", 0.0);
    cost.optimizer = std::max(cost.optimizer, stats.value("optimizer_bytes", int64_t{0}));
    cost.peak = std::max(cost.peak, stats.value("peak_rss_bytes", int64_t{0}));
    cost.device = std::max(cost.device, stats.value("peak_device_bytes", int64_t{0}));
  }
  if (costs.empty()) return std::nullopt;
  core::Json rows = core::Json::array();
  for (const std::string& name : order) {
    const Cost& cost = costs[name];
    rows.push_back({{"training", name},
                    {"units", cost.units},
                    {"seconds", cost.seconds},
                    {"speed", static_cast<double>(cost.tokens) / std::max(1e-9, cost.seconds)},
                    {"optimizer", static_cast<double>(cost.optimizer) / (1 << 20)},
                    {"peak", static_cast<double>(cost.peak) / (1 << 20)}});
  }
  core::Json table = {
      {"title", "What training cost"},
      {"columns",
       {{{"key", "training"}, {"label", "training"}},
        {{"key", "units"}, {"label", "units"}},
        {{"key", "seconds"}, {"label", "seconds"}, {"digits", 1}},
        {{"key", "speed"}, {"label", "sequences or tokens per second"}, {"digits", 0}},
        {{"key", "optimizer"}, {"label", "optimiser's state, MiB"}, {"digits", 2}},
        {{"key", "peak"}, {"label", "most memory of the process, MiB"}, {"digits", 0}}}},
      {"rows", rows},
      {"notes", {"as the workers measured it, resumed parts excluded; memory: of the whole process until then"}}};
  if (std::any_of(costs.begin(), costs.end(), [](const auto& cost) { return cost.second.device > 0; })) {
    table["columns"].push_back({{"key", "device"}, {"label", "most memory of the device, MiB"}, {"digits", 0}});
    table["notes"].push_back("memory of the device: tensors of one unit, without what the allocator keeps free");
    for (core::Json& row : table["rows"])
      row["device"] = static_cast<double>(costs[row.at("training")].device) / (1 << 20);
  }
  return table;
}

}  // namespace

void write_plan_file(const algorithms::ParsedRecipe& recipe, const std::filesystem::path& run_directory) {
  core::Json resolved = core::Json::array();
  for (const auto& value : recipe.resolved)
    resolved.push_back({{"path", value.path}, {"value", value.value}, {"origin", value.origin}});
  core::write_atomically(run_directory / kPlanFile,
                         core::Json{{"inputs", recipe.method->inputs()}, {"resolved", resolved}}.dump(1) + "\n");
}

core::Json versions() {
  return {{"moraine", MORAINE_VERSION},
          {"torch", MORAINE_TORCH_VERSION},
          {"compiler", MORAINE_COMPILER},
          {"build", MORAINE_BUILD}};
}

std::unique_ptr<algorithms::Method> restore_method(const coordinator::RunRecord& run) {
  const core::Json plan = read_plan_file(run.layout.root);
  return algorithms::restore_method(run.recipe, plan.at("inputs"),
                                    fmt::format("{}: recipe.json and {}", run.layout.root.string(), kPlanFile));
}

core::Json from_stored(const coordinator::RunRecord& run, const std::function<core::Json()>& use) {
  const auto refuse = [&](const std::exception& error) {
    return core::UserError(
        fmt::format("cli: {}: recipe.json and inputs.json do not fit each other or the recorded units: {}",
                    run.layout.root.string(), error.what()),
        "`moraine run` with the run's recipe writes both again; if nobody changed them, please report this as a bug");
  };
  try {
    return use();
  } catch (const core::InternalError& error) {
    throw refuse(error);
  } catch (const core::Error&) {
    throw;
  } catch (const core::Json::exception& error) {
    throw refuse(error);
  } catch (const std::logic_error& error) {  // a name of one that the other does not have
    throw refuse(error);
  }
}

core::Json summarize(const algorithms::Method& method, const coordinator::RunRecord& run) {
  core::Json summary = method.summary(*run.state);
  const algorithms::Plan plan = method.plan(*run.state);
  if (const auto costs = training_costs(plan, run)) summary["tables"].push_back(*costs);
  summary["format"] = 1;
  summary["name"] = run.recipe.at("name");
  summary["method"] = run.recipe.at("method");
  summary["complete"] = plan.pending.empty() && !method.missing_result(*run.state);
  summary["timeline"] = timeline(plan, run);
  summary["timing"] = timing(plan, run);
  summary["versions"] = versions();
  summary["recipe"] = read_plan_file(run.layout.root).at("resolved");
  return summary;
}

void write_report(const core::Json& summary, const std::filesystem::path& run_directory) {
  core::write_atomically(run_directory / "summary.json", summary.dump(1) + "\n");
  core::write_atomically(run_directory / "report.html", report::render_html(summary));
}

}  // namespace moraine::cli
