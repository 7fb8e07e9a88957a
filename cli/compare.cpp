#include <map>

#include <CLI/CLI.hpp>

#include "cli/command.h"
#include "cli/output.h"
#include "cli/run_summary.h"
#include "coordinator/report/table.h"
#include "core/error.h"

namespace moraine::cli {
namespace {

namespace fs = std::filesystem;

struct CompareArguments {
  std::string first, second, format = "text";
  bool all = false;
};

// Dotted path -> value. Elements of lists that have a name go by it, so that another order is no difference.
void flatten(const core::Json& value, const std::string& path, std::map<std::string, core::Json>& out) {
  if (value.is_object() && !value.empty()) {
    for (const auto& [key, part] : value.items()) flatten(part, path.empty() ? key : path + "." + key, out);
  } else if (value.is_array() && !value.empty() && value.front().is_object()) {
    for (size_t i = 0; i < value.size(); ++i)
      flatten(value[i], fmt::format("{}.{}", path, value[i].value("name", std::to_string(i))), out);
  } else {
    out[path] = value;
  }
}

core::Json text_of(const core::Json& value) {
  return value.is_string() || value.is_null() ? value : core::Json(value.dump());
}

core::Json recipe_rows(const core::Json& a, const core::Json& b, const std::vector<std::string>& names) {
  std::map<std::string, core::Json> first, second;
  flatten(a, "", first);
  flatten(b, "", second);
  std::map<std::string, bool> keys;
  for (const auto& [key, value] : first) keys[key] = true;
  for (const auto& [key, value] : second) keys[key] = true;
  core::Json rows = core::Json::array();
  for (const auto& [key, unused] : keys) {
    const core::Json x = first.count(key) ? first[key] : core::Json(),
                     y = second.count(key) ? second[key] : core::Json();
    if (x != y) rows.push_back({{"key", key}, {names[0], text_of(x)}, {names[1], text_of(y)}});
  }
  return rows;
}

// A row of a summary's table is found again by the texts in it.
std::string row_name(const core::Json& table, const core::Json& row) {
  std::string name;
  for (const auto& column : table.at("columns"))
    if (const auto cell = row.find(column.at("key").get<std::string>()); cell != row.end() && cell->is_string())
      name += (name.empty() ? "" : " ") + cell->get<std::string>();
  return name;
}

core::Json result_rows(const core::Json& a, const core::Json& b, const std::vector<std::string>& names, bool all) {
  core::Json rows = core::Json::array();
  std::map<std::string, const core::Json*> tables;
  for (const auto& table : b.at("tables")) tables[table.at("title").get<std::string>()] = &table;
  for (const auto& table : a.at("tables")) {
    const auto other = tables.find(table.at("title").get<std::string>());
    if (other == tables.end()) continue;
    std::map<std::string, const core::Json*> partners;
    for (const auto& row : other->second->at("rows")) partners.emplace(row_name(*other->second, row), &row);
    for (const auto& row : table.at("rows")) {
      const auto partner = partners.find(row_name(table, row));
      if (partner == partners.end()) continue;
      for (const auto& column : table.at("columns")) {
        const auto key = column.at("key").get<std::string>();
        const core::Json x = row.value(key, core::Json()), y = partner->second->value(key, core::Json());
        if (!x.is_number() || !y.is_number() || (x == y && !all)) continue;
        rows.push_back({{"table", table.at("title")},
                        {"row", partner->first},
                        {"column", column.at("label")},
                        {names[0], x},
                        {names[1], y},
                        {"difference", y.get<double>() - x.get<double>()}});
      }
    }
  }
  return rows;
}

// Directory names as column headings when they tell the runs apart.
std::vector<std::string> headings(const fs::path& a, const fs::path& b) {
  const std::string first = fs::absolute(a / "").parent_path().filename().string(),
                    second = fs::absolute(b / "").parent_path().filename().string();
  return first == second ? std::vector<std::string>{"A", "B"} : std::vector<std::string>{first, second};
}

// Numbers of one column here are of different kinds, so each is written by itself.
core::Json as_text(core::Json rows) {
  for (auto& row : rows)
    for (auto& [key, value] : row.items())
      if (value.is_number_float()) value = fmt::format("{:.6g}", value.get<double>());
  return rows;
}

struct Facts {
  core::Json summary, inputs;
};

Facts facts_of(const coordinator::RunRecord& run) {
  Facts facts;
  facts.summary = from_stored(run, [&] {
    const auto method = restore_method(run);
    facts.inputs = method->inputs();
    return summarize(*method, run);
  });
  return facts;
}

// What both summaries say they were measured on has to be the same where both name it.
void require_same_data(const core::Json& a, const core::Json& b, const std::vector<std::string>& names) {
  const core::Json first = a.value("measured_on", core::Json::object()),
                   second = b.value("measured_on", core::Json::object());
  for (const auto& [what, hash] : first.items())
    if (second.contains(what) && second.at(what) != hash)
      throw core::UserError(
          fmt::format("cli: {} and {} were measured on different data: {} is {} and {}", names[0], names[1], what,
                      hash.get<std::string>().substr(0, 16), second.at(what).get<std::string>().substr(0, 16)),
          "their numbers are of other examples; compare runs of the same data, `stream` and `seed`");
}

void compare(const CompareArguments& arguments) {
  const auto first = coordinator::read_run(arguments.first), second = coordinator::read_run(arguments.second);
  const Facts a = facts_of(first), b = facts_of(second);
  const auto names = headings(arguments.first, arguments.second);
  require_same_data(a.summary, b.summary, names);
  const core::Json recipe = recipe_rows({{"recipe", first.recipe}, {"inputs", a.inputs}},
                                        {{"recipe", second.recipe}, {"inputs", b.inputs}}, names);
  const core::Json results = result_rows(a.summary, b.summary, names, arguments.all);
  const auto hash_a = a.summary.value("hash", ""), hash_b = b.summary.value("hash", "");
  const std::string verdict = hash_a.empty() || hash_b.empty() ? "at least one run has no merged artefact yet"
                              : hash_a == hash_b ? "the merged artefacts are equal, bit for bit: " + hash_a
                                                 : fmt::format("the merged artefacts differ: {} and {}",
                                                               hash_a.substr(0, 16), hash_b.substr(0, 16));
  if (arguments.format == "json") {
    const core::Json out = {{"runs", {arguments.first, arguments.second}},
                            {"recipe", recipe},
                            {"results", results},
                            {"hashes", {hash_a, hash_b}}};
    print_json(out);
    return;
  }
  const report::TableStyle style = table_style(160);
  std::string text;
  text += recipe.empty() ? "Recipes and inputs are equal.\n"
                         : report::render_table(
                               report::plain_table("Recipe and inputs", {"key", names[0], names[1]}, recipe), style);
  text += results.empty()
              ? std::string(arguments.all ? "No table has a number in common.\n" : "No number in the tables differs.\n")
              : report::render_table(
                    report::plain_table("Results", {"table", "row", "column", names[0], names[1], "difference"},
                                        as_text(results)),
                    style);
  print(text + verdict + "\n");
}

}  // namespace

void add_compare(CLI::App& app, int& exit_code) {
  auto* command = app.add_subcommand("compare", "What differs between two runs: recipe, inputs, numbers of the tables");
  auto arguments = std::make_shared<CompareArguments>();
  command->add_option("first", arguments->first, "Run directory")->required();
  command->add_option("second", arguments->second, "Run directory")->required();
  command->add_flag("--all", arguments->all, "Numbers that are equal as well");
  add_format_option(*command, arguments->format);
  command->footer("Example: moraine compare runs/quickstart runs/seed2");
  command->callback([=, &exit_code] {
    compare(*arguments);
    exit_code = 0;
  });
}

}  // namespace moraine::cli
