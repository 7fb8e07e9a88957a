#include <filesystem>
#include <fstream>
#include <set>

#include <gtest/gtest.h>

#include "algorithms/register.h"

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

// Folders of plug-in kinds hold many small things, those of shared machinery what a family of methods has in common;
// every other folder is a whole method.
TEST(Registry, EveryMethodFolderIsRegisteredAndHasReadmeRecipeAndTest) {
  const std::set<std::string> shared = {"adapters", "routers", "mergers", "federated", "continual"};
  std::set<std::string> names, used;
  for (const auto& entry : methods()) names.insert(entry.name);
  for (const auto& file : fs::recursive_directory_iterator(kSource / "recipes"))
    if (file.path().extension() == ".yaml") used.insert(load_recipe(file.path(), {}).run.method);
  std::string tests;
  for (const auto& file : fs::recursive_directory_iterator(kSource / "tests"))
    if (file.path().extension() == ".cpp" || file.path().extension() == ".py") tests += text_of(file.path());
  for (const auto& folder : fs::directory_iterator(kSource / "algorithms")) {
    const std::string name = folder.path().filename().string();
    if (!folder.is_directory()) continue;
    EXPECT_TRUE(fs::exists(folder.path() / "README.md")) << name;
    if (shared.count(name)) continue;
    EXPECT_TRUE(names.count(name)) << name << " is not in algorithms/register.cpp";
    EXPECT_TRUE(used.count(name)) << "no recipe has method: " << name;
    EXPECT_NE(tests.find(name), std::string::npos) << "no test speaks of " << name;
  }
}

TEST(Registry, EveryRecipeParses) {
  int recipes = 0;
  for (const auto& file : fs::recursive_directory_iterator(kSource / "recipes")) {
    if (file.path().extension() != ".yaml") continue;
    EXPECT_NO_THROW(load_recipe(file.path(), {})) << file.path();
    ++recipes;
  }
  EXPECT_GE(recipes, 4);
}

}  // namespace
}  // namespace moraine::algorithms
