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

// Folders of plug-in kinds hold many small things; every other folder is a whole method.
TEST(Registry, EveryMethodFolderIsRegisteredAndHasReadmeRecipeAndTest) {
  const std::set<std::string> plug_in_kinds = {"adapters", "routers", "mergers"};
  std::set<std::string> names;
  for (const auto& entry : methods()) names.insert(entry.name);
  for (const auto& folder : fs::directory_iterator(kSource / "algorithms")) {
    const std::string name = folder.path().filename().string();
    if (!folder.is_directory() || plug_in_kinds.count(name)) continue;
    EXPECT_TRUE(names.count(name)) << name << " is not in algorithms/register.cpp";
    EXPECT_TRUE(fs::exists(folder.path() / "README.md")) << name;
    EXPECT_TRUE(fs::is_directory(kSource / "recipes" / name)) << name << " has no recipe folder";
    bool tested = false;
    for (const auto& test : fs::directory_iterator(kSource / "tests" / "algorithms")) tested |= test.path().filename().string().starts_with(name);
    EXPECT_TRUE(tested) << name << " has no test file";
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
