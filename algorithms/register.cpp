#include "algorithms/register.h"

#include <set>
#include <stdexcept>

#include "algorithms/arithmetic.h"
#include "algorithms/continual/continual.h"
#include "algorithms/fedex_lora/fedex_lora.h"
#include "algorithms/fedit/fedit.h"
#include "algorithms/ffa_lora/ffa_lora.h"
#include "algorithms/finetune/finetune.h"
#include "algorithms/flexlora/flexlora.h"
#include "algorithms/flexmore/flexmore.h"
#include "algorithms/flora/flora.h"
#include "algorithms/hetlora/hetlora.h"
#include "core/error.h"
#include "core/hash.h"
#include "core/registry.h"

namespace moraine::algorithms {

const std::vector<MethodEntry>& methods() {
  static const std::vector<MethodEntry> entries = {
      continual::method_entry(), fedex_lora::method_entry(), fedit::method_entry(),
      ffa_lora::method_entry(),  finetune::method_entry(),   flexlora::method_entry(),
      flexmore::method_entry(),  flora::method_entry(),      hetlora::method_entry(),
  };
  return entries;
}

const MethodEntry& find_method(const std::string& name) {
  std::vector<std::string> known;
  for (const auto& entry : methods()) {
    if (entry.name == name) return entry;
    known.push_back(entry.name);
  }
  throw core::UserError(fmt::format("method: no method '{}'", name), core::name_hint(name, known));
}

std::string recipe_identity(const ParsedRecipe& recipe) {
  const MethodEntry& entry = find_method(recipe.run.method);
  return core::sha256(core::Json{
      {"method", recipe.run.method}, {"recipe", entry.identity(recipe.values)}, {"inputs", recipe.method->inputs()}}
                          .dump());
}

std::unique_ptr<Method> restore_method(const core::Json& values, const core::Json& inputs, const std::string& origin) {
  constexpr const char* kHint =
      "the files of the run were changed, or another version wrote them; `moraine run` with the recipe and "
      "this --run-dir writes them anew and keeps what is finished";
  try {
    return find_method(values.at("method").get<std::string>()).restore(values, inputs);
  } catch (const core::Json::exception& error) {
    throw core::UserError(fmt::format("{}: not what a run records: {}", origin, error.what()), kHint);
  } catch (const core::UserError& error) {
    throw core::UserError(fmt::format("{}: {}", origin, error.what()), kHint);
  } catch (const std::out_of_range& error) {  // inputs that lack what the recipe names
    throw core::UserError(fmt::format("{}: they do not fit each other: {}", origin, error.what()), kHint);
  }
}

namespace {

// Without a method nobody knows which keys a recipe may have: those that no method has are named here, since a misspelt
// `defaults` or `method` is why.
void name_unknown_keys(const core::ConfigNode& root, core::Problems& problems) {
  std::set<std::string> known{"defaults"};
  for (const auto& entry : methods())
    for (const auto& [key, schema] : entry.json_schema().at("properties").items()) known.insert(key);
  const std::vector<std::string> names(known.begin(), known.end());
  for (size_t i = 0; i < root.members.size(); ++i) {
    const std::string& key = root.members[i].first;
    if (known.contains(key)) continue;
    const std::string near = core::nearest_name(key, names);
    problems.add(root.member_origins[i], key, "unknown key",
                 near.empty() ? "" : fmt::format("did you mean '{}'?", near));
  }
}

}  // namespace

ParsedRecipe load_recipe(const std::filesystem::path& path, const std::vector<std::string>& overrides) {
  core::Problems problems;
  core::ConfigNode root = core::load_config(path, overrides, problems);
  name_arithmetic(root, problems);
  const core::ConfigNode* name = root.find("method");
  const MethodEntry* entry = nullptr;
  try {
    entry = &find_method(name ? name->text : "");
  } catch (const core::UserError& error) {
    problems.add(name ? name->origin : root.origin, "method",
                 name ? fmt::format("no method '{}'", name->text) : "is missing", error.hint());
    if (name == nullptr) name_unknown_keys(root, problems);
    problems.throw_if_any(path.string());
  }
  ParsedRecipe recipe = entry->parse(root, problems);
  problems.throw_if_any(path.string());
  return recipe;
}

}  // namespace moraine::algorithms
