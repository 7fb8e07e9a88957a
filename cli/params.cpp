#include <CLI/CLI.hpp>

#include "algorithms/register.h"
#include "cli/command.h"
#include "cli/output.h"
#include "coordinator/report/table.h"

namespace moraine::cli {
namespace {

void print_params(const RecipeArguments& arguments, const std::string& format) {
  const auto recipe = algorithms::load_recipe(arguments.recipe, arguments.overrides);
  const algorithms::ParameterTable counts = recipe.method->parameters();
  core::Json rows = core::Json::array();
  for (const auto& row : counts.rows) {
    core::Json line = core::Json::object();
    for (size_t i = 0; i < counts.columns.size(); ++i) line[counts.columns[i]] = row[i];
    rows.push_back(line);
  }
  core::Json table = report::plain_table(recipe.run.name, counts.columns, rows);
  table["notes"] = counts.notes;
  format == "json" ? print_json(table) : print(report::render_table(table, table_style()));
}

}  // namespace

void add_params(CLI::App& app, int& exit_code) {
  auto* command = app.add_subcommand("params", "Exact parameter counts of a recipe, from shapes alone");
  auto arguments = std::make_shared<RecipeArguments>();
  auto format = std::make_shared<std::string>("text");
  add_recipe_arguments(*command, *arguments);
  add_format_option(*command, *format);
  command->footer("Example: moraine params recipes/flexmore/olmo2-7b.yaml");
  command->callback([=, &exit_code] {
    print_params(*arguments, *format);
    exit_code = 0;
  });
}

}  // namespace moraine::cli
