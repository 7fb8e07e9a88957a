#include <limits>

#include <CLI/CLI.hpp>

#include "algorithms/register.h"
#include "cli/command.h"
#include "cli/output.h"
#include "coordinator/report/table.h"

namespace moraine::cli {
namespace {

struct ValidateArguments : RecipeArguments {
  std::string format = "text";
  bool schema_only = false, all = false;
};

void validate(const ValidateArguments& arguments) {
  auto recipe = algorithms::load_recipe(arguments.recipe, arguments.overrides);
  if (!arguments.schema_only) recipe.method->open_inputs();
  core::Json rows = core::Json::array();
  size_t defaults = 0;
  for (const auto& value : recipe.resolved) {
    const bool is_default = value.origin == "default";
    defaults += is_default ? 1 : 0;
    if (!is_default || arguments.all || arguments.format == "json")
      rows.push_back({{"key", value.path}, {"value", value.value}, {"origin", value.origin}});
  }
  if (arguments.format == "json") return print_json(rows);
  report::TableStyle style = table_style();
  style.width = std::numeric_limits<size_t>::max();  // one table, however long a value is
  std::string text =
      report::render_table(report::plain_table(arguments.recipe, {"key", "value", "origin"}, rows), style);
  if (!arguments.all) text += fmt::format("{} more keys have their defaults: --all shows them\n", defaults);
  print(text);
  print(arguments.schema_only ? "valid: keys, types and ranges\n"
                              : "valid: keys, types, ranges, model and data files\n");
}

}  // namespace

void add_validate(CLI::App& app, int& exit_code) {
  auto* command = app.add_subcommand("validate", "Check a recipe and print its values with where they came from");
  auto arguments = std::make_shared<ValidateArguments>();
  add_recipe_arguments(*command, *arguments);
  add_format_option(*command, arguments->format);
  command->add_flag("--all", arguments->all, "Also the values that are defaults (JSON always has all)");
  command->add_flag("--schema-only", arguments->schema_only, "Do not look at the files the recipe names");
  command->footer("Example: moraine validate recipes/quickstart.yaml train.steps=20");
  command->callback([=, &exit_code] {
    validate(*arguments);
    exit_code = 0;
  });
}

}  // namespace moraine::cli
