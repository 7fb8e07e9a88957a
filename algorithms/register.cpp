#include "algorithms/register.h"

#include "algorithms/flexmore/flexmore.h"
#include "core/error.h"
#include "core/registry.h"

namespace moraine::algorithms {

const std::vector<MethodEntry>& methods() {
  static const std::vector<MethodEntry> entries = {
      flexmore::method_entry(),
  };
  return entries;
}

ParsedRecipe load_recipe(const std::filesystem::path& path, const std::vector<std::string>& overrides) {
  core::Problems problems;
  const core::ConfigNode root = core::load_config(path, overrides, problems);
  const core::ConfigNode* name = root.find("method");
  std::vector<std::string> known;
  for (const auto& entry : methods()) known.push_back(entry.name);
  if (!name) {
    problems.add(root.origin, "method", "is missing", "one of: " + fmt::format("{}", fmt::join(known, ", ")));
    problems.throw_if_any(path.string());
  }
  for (const auto& entry : methods()) {
    if (entry.name != name->text) continue;
    ParsedRecipe recipe = entry.parse(root, std::filesystem::absolute(path).parent_path(), problems);
    problems.throw_if_any(path.string());
    return recipe;
  }
  problems.add(name->origin, "method", fmt::format("no method '{}'", name->text), core::name_hint(name->text, known));
  problems.throw_if_any(path.string());
  throw core::InternalError("unreachable: an unknown method is a problem");
}

}  // namespace moraine::algorithms
