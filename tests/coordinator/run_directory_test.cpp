#include "coordinator/run_directory.h"

#include <gmock/gmock.h>

#include <sys/wait.h>
#include <unistd.h>

#include <fstream>

#include "core/error.h"
#include "toy.h"

namespace moraine::coordinator {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

Recipe recipe(core::Json values) { return {"name: toy\n", "name: toy  # recipe.yaml:1\n", std::move(values)}; }

core::Json values() {
  return {{"name", "toy"},
          {"train", {{"steps", 100}, {"log_every", 10}, {"checkpoint_every", 50}}},
          {"experts", {{{"rank", 4}}, {{"rank", 16}}}},
          {"workers", {{"threads", 1}, {"device", "cpu"}}}};
}

TEST(RunDirectory, StoresTheRecipeAndOpensAgain) {
  const TemporaryDirectory directory;
  const auto root = directory.path() / "run";
  { RunDirectory::open(root, recipe(values()), false); }
  const RunDirectory again = RunDirectory::open(root, recipe(values()), false);
  EXPECT_EQ(core::read_text(again.layout().recipe_yaml()), "name: toy\n");
  EXPECT_EQ(core::read_json(again.layout().recipe_json()), values());
  EXPECT_TRUE(std::filesystem::exists(again.layout().resolved_yaml()));
}

TEST(RunDirectory, RefusesAnotherRecipeAndListsWhatDiffers) {
  const TemporaryDirectory directory;
  { RunDirectory::open(directory.path(), recipe(values()), false); }
  core::Json changed = values();
  changed["train"]["steps"] = 200;
  changed["experts"][1]["rank"] = 64;
  changed["experts"].push_back({{"rank", 1}});
  try {
    RunDirectory::open(directory.path(), recipe(changed), false);
    FAIL() << "another recipe was taken";
  } catch (const core::UserError& error) {
    EXPECT_THAT(error.what(), HasSubstr("train.steps: 100 -> 200"));
    EXPECT_THAT(error.what(), HasSubstr("experts.1.rank: 16 -> 64"));
    EXPECT_THAT(error.what(), HasSubstr("experts.2.rank: (absent) -> 1"));
    EXPECT_THAT(error.hint(), HasSubstr("--accept-changes"));
  }
  EXPECT_EQ(core::read_json(RunLayout{directory.path()}.recipe_json()), values())
      << "a refused recipe must not be stored";
  { RunDirectory::open(directory.path(), recipe(changed), true); }
  EXPECT_EQ(core::read_json(RunLayout{directory.path()}.recipe_json()), changed);
}

TEST(RunDirectory, AsksTheMethodWhatMakesARecipeAnother) {
  EXPECT_THAT(recipe_changes({{"a", 1}, {"b", core::Json::array()}}, {{"a", 1.5}, {"b", {1}}}),
              ElementsAre("a: 1 -> 1.5", "b: [] -> (absent)", "b.0: (absent) -> 1"));
  const TemporaryDirectory directory;
  Recipe first = recipe(values());
  first.identity = [](const core::Json& all) { return core::Json{{"steps", all.at("train").at("steps")}}; };
  { RunDirectory::open(directory.path(), first, false); }
  Recipe second = first;
  second.values["name"] = "another";
  EXPECT_NO_THROW(RunDirectory::open(directory.path(), second, false));
  second.values["train"]["steps"] = 99;
  EXPECT_THROW(RunDirectory::open(directory.path(), second, false), core::UserError);
}

TEST(RunDirectory, RepairsARecipeThatCannotBeRead) {
  const TemporaryDirectory directory;
  const RunLayout layout{directory.path()};
  for (const char* damage : {"{\"name\": \"to", "", "null", "[1]"}) {
    { RunDirectory::open(directory.path(), recipe(values()), false); }
    std::ofstream(layout.recipe_json(), std::ios::trunc) << damage;
    EXPECT_NO_THROW(RunDirectory::open(directory.path(), recipe(values()), false)) << damage;
    EXPECT_EQ(core::read_json(layout.recipe_json()), values()) << damage;
  }
}

TEST(RunDirectory, RefusesADirectoryOfSomethingElse) {
  const TemporaryDirectory directory;
  std::ofstream(directory.path() / "thesis.tex") << "precious";
  EXPECT_THROW(RunDirectory::open(directory.path(), recipe(values()), false), core::UserError);
  EXPECT_THROW(RunDirectory::open(directory.path() / "thesis.tex", recipe(values()), false), core::UserError);
}

TEST(RunDirectory, FinishesWhatACrashWhileMakingItLeft) {
  const TemporaryDirectory directory;
  std::ofstream(directory.path() / "lock") << "1 host\n";
  std::ofstream(directory.path() / ".recipe.json.0123.tmp") << "{";
  std::filesystem::create_directories(directory.path());
  EXPECT_NO_THROW(RunDirectory::open(directory.path(), recipe(values()), false));
}

TEST(RunDirectory, RemovesUnfinishedFilesOfAKilledProcess) {
  const TemporaryDirectory directory;
  { RunDirectory::open(directory.path(), recipe(values()), false); }
  const auto left = directory.path() / "artefacts" / "ab" / ".cd.safetensors.00ff.tmp";
  const auto kept = directory.path() / "artefacts" / "ab" / "cd.safetensors";
  std::filesystem::create_directories(left.parent_path());
  std::ofstream(left) << "half";
  std::ofstream(kept) << "whole";
  RunDirectory::open(directory.path(), recipe(values()), false);
  EXPECT_FALSE(std::filesystem::exists(left));
  EXPECT_TRUE(std::filesystem::exists(kept));
}

TEST(RunDirectory, NamesTheProcessThatUsesIt) {
  const TemporaryDirectory directory;
  int ready[2], done[2];
  ASSERT_EQ(pipe(ready), 0);
  ASSERT_EQ(pipe(done), 0);
  const pid_t child = fork();
  if (child == 0) {  // holds the directory until the parent closes its end
    char byte = 0;
    close(done[1]);
    const RunDirectory held = RunDirectory::open(directory.path(), recipe(values()), false);
    if (write(ready[1], "r", 1) != 1 || read(done[0], &byte, 1) != 0) _exit(1);
    _exit(0);
  }
  char byte = 0;
  ASSERT_EQ(read(ready[0], &byte, 1), 1);
  try {
    RunDirectory::open(directory.path(), recipe(values()), false);
    ADD_FAILURE() << "two processes in one run directory";
  } catch (const core::UserError& error) {
    EXPECT_THAT(error.what(), HasSubstr(fmt::format("{} ", child)));
  }
  close(done[1]);
  int status = -1;
  waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
  EXPECT_NO_THROW(RunDirectory::open(directory.path(), recipe(values()), false));
}

}  // namespace
}  // namespace moraine::coordinator
