#include <CLI/CLI.hpp>

#include "algorithms/register.h"
#include "cli/command.h"
#include "cli/output.h"
#include "core/json.h"

namespace moraine::cli {
namespace {

// One schema for recipes of every method: which one applies follows from the key `method`.
core::Json schema_of_all() {
  core::Json names = core::Json::array(), branches = core::Json::array();
  for (const auto& entry : algorithms::methods()) {
    core::Json schema = entry.json_schema();
    schema.erase("$schema");
    names.push_back(entry.name);
    branches.push_back({{"if", {{"properties", {{"method", {{"const", entry.name}}}}}}}, {"then", std::move(schema)}});
  }
  return {{"$schema", "https://json-schema.org/draft/2020-12/schema"},
          {"title", "Moraine recipe"},
          {"type", "object"},
          {"required", {"method"}},
          {"properties", {{"method", {{"enum", names}}}}},
          {"allOf", branches}};
}

std::string reference(const std::string& method) {
  std::string text;
  for (const auto& entry : algorithms::methods())
    if (method.empty() || entry.name == method)
      text += fmt::format("## {}: {}\n\n{}\n", entry.name, entry.summary, entry.markdown());
  return text;
}

}  // namespace

void add_config_schema(CLI::App& app, int& exit_code) {
  auto* command =
      app.add_subcommand("config-schema", "JSON Schema of recipes, for editors; or the table of keys as Markdown");
  auto method = std::make_shared<std::string>();
  auto format = std::make_shared<std::string>("json");
  command->add_option("method", *method, "Only this method (default: all)");
  command->add_option("--format", *format, "json | markdown")
      ->check(CLI::IsMember({"json", "markdown"}))
      ->capture_default_str();
  command->footer(
      "Example: moraine config-schema > recipe.schema.json\n"
      "Then begin a recipe with: # yaml-language-server: $schema=recipe.schema.json");
  command->callback([=, &exit_code] {
    if (!method->empty()) algorithms::find_method(*method);  // names the valid ones
    const core::Json schema = method->empty() ? schema_of_all() : algorithms::find_method(*method).json_schema();
    *format == "json" ? print_json(schema) : print(reference(*method));
    exit_code = 0;
  });
}

}  // namespace moraine::cli
