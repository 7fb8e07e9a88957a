#include <cstdio>

#include <CLI/CLI.hpp>

#include "algorithms/register.h"
#include "cli/command.h"
#include "coordinator/report/table.h"

namespace moraine::cli {
namespace {

void validate(const RecipeArguments& arguments, const std::string& format, bool schema_only) {
  auto recipe = algorithms::load_recipe(arguments.recipe, arguments.overrides);
  if (!schema_only) recipe.method->open_inputs();
  core::Json rows = core::Json::array();
  for (const auto& value : recipe.resolved)
    rows.push_back({{"key", value.path}, {"value", value.value}, {"origin", value.origin}});
  if (format == "json") {
    std::fputs((rows.dump(2) + "\n").c_str(), stdout);
    return;
  }
  std::fputs(report::render_table(report::plain_table(arguments.recipe, {"key", "value", "origin"}, rows)).c_str(),
             stdout);
  std::fputs(schema_only ? "valid: keys, types and ranges\n" : "valid: keys, types, ranges, model and data files\n",
             stdout);
}

}  // namespace

void add_validate(CLI::App& app, int& exit_code) {
  auto* command = app.add_subcommand("validate", "Check a recipe and print every value with where it came from");
  auto arguments = std::make_shared<RecipeArguments>();
  auto format = std::make_shared<std::string>("text");
  auto schema_only = std::make_shared<bool>(false);
  add_recipe_arguments(*command, *arguments);
  add_format_option(*command, *format);
  command->add_flag("--schema-only", *schema_only, "Do not look at the files the recipe names");
  command->footer("Example: moraine validate recipes/quickstart.yaml train.steps=20");
  command->callback([=, &exit_code] {
    validate(*arguments, *format, *schema_only);
    exit_code = 0;
  });
}

}  // namespace moraine::cli
