#include <filesystem>
#include <fstream>
#include <regex>
#include <set>

#include <gtest/gtest.h>

#include "algorithms/language_model.h"
#include "algorithms/register.h"
#include "models/vit.h"
#include "tests/temporary_directory.h"

namespace moraine::algorithms {
namespace {

namespace fs = std::filesystem;
const fs::path kSource = MORAINE_SOURCE_DIR;

TEST(Registry, IsSorted) {
  for (size_t i = 1; i < methods().size(); ++i) EXPECT_LT(methods()[i - 1].name, methods()[i].name);
}

std::string text_of(const fs::path& file) {
  std::ifstream in(file);
  return {std::istreambuf_iterator<char>(in), {}};
}

// Whether a test runs the method: by name as a whole word, not as part of another.
bool runs(const std::string& tests, const std::string& method) {
  return std::regex_search(tests, std::regex("[\"']" + method + "[\"']|method[=:] ?" + method + "\\b"));
}

// As a user reads it, but for a fetched model: the one of the repository, or a small one of the same kind, stands for
// that.
ParsedRecipe parsed(const fs::path& recipe) {
  const std::string text = text_of(recipe);
  if (text.find("model: {path: ../../.cache/") == std::string::npos) return load_recipe(recipe, {});
  if (text.find("method: continual") == std::string::npos)
    return load_recipe(recipe, {"model.path=" + (kSource / "recipes/models/tiny-public").string()});
  const TemporaryDirectory directory;
  models::VitConfig config;
  config.image_size = 28, config.patch_size = 14, config.hidden_size = 8, config.intermediate_size = 12;
  config.num_layers = 1, config.num_heads = 2;
  const auto model = models::Vit::from_config(config, 1, at::kFloat);
  write_model_directory(directory / "vit", config.to_json(), {model.weights().begin(), model.weights().end()});
  return load_recipe(recipe, {"model.path=" + (directory / "vit").string()});
}

// Adapters, mergers and objectives are many small things, federated what a family of methods has in common, galore a
// way to train all weights; every other folder is a whole method.
TEST(Registry, EveryMethodFolderIsRegisteredAndHasReadmeRecipeAndTest) {
  const std::set<std::string> shared = {"adapters", "federated", "galore", "mergers", "objectives"};
  std::set<std::string> names, used;
  for (const auto& entry : methods()) names.insert(entry.name);
  for (const auto& file : fs::recursive_directory_iterator(kSource / "recipes"))
    if (file.path().extension() == ".yaml") used.insert(parsed(file.path()).run.method);
  std::string tests;
  for (const auto& file : fs::recursive_directory_iterator(kSource / "tests"))
    if (file.path().extension() == ".cpp" || file.path().extension() == ".py") tests += text_of(file.path());
  for (const auto& folder : fs::directory_iterator(kSource / "algorithms")) {
    const std::string name = folder.path().filename().string();
    if (!folder.is_directory()) continue;
    EXPECT_TRUE(fs::exists(folder.path() / "README.md")) << name;
    if (shared.count(name)) {
      EXPECT_NE(tests.find("#include \"algorithms/" + name + "/"), std::string::npos) << "no test includes " << name;
      continue;
    }
    EXPECT_TRUE(names.count(name)) << name << " is not in algorithms/register.cpp";
    EXPECT_TRUE(used.count(name)) << "no recipe has method: " << name;
    EXPECT_TRUE(runs(tests, name)) << "no test runs " << name;
  }
  EXPECT_FALSE(runs("a federated method, \"fedits\", method: fedit_2", "fedit"));
}

TEST(Registry, EveryRecipeParses) {
  int recipes = 0;
  for (const auto& file : fs::recursive_directory_iterator(kSource / "recipes")) {
    if (file.path().extension() != ".yaml") continue;
    EXPECT_NO_THROW(parsed(file.path())) << file.path();
    ++recipes;
  }
  EXPECT_GE(recipes, static_cast<int>(methods().size()));  // one of each method, at least
}

}  // namespace
}  // namespace moraine::algorithms
