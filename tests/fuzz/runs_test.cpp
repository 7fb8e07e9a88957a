// Spoilt files of finished runs: every command that reads a run, and `run` itself, which has to come to the undisturbed
// result or to refuse.
#include <algorithm>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "coordinator/journal.h"
#include "coordinator/run_directory.h"
#include "core/error.h"
#include "core/file.h"
#include "core/json.h"
#include "tests/fuzz/command.h"
#include "tests/fuzz/mutators.h"
#include "tests/fuzz/world.h"

namespace moraine::fuzz {
namespace {

namespace fs = std::filesystem;

using Line = std::vector<std::string>;

/// A run of the world, with what says which one it is.
struct Example {
  std::string name, recipe, unit;      // a label to cat and cp
  std::vector<std::string> overrides;  // what the world ran it with
};

const Example kFlexmore = {"flexmore", "text/recipe.yaml", "extract/left", {"train.steps=3", "workers.local=1"}};
const Example kFederated = {"federated", "federated.yaml", "aggregate/2", {}};
const Example kContinual = {"continual", "images/recipe.yaml", "", {"train.steps=2", "workers.local=1", "orders=[-1]"}};

std::string hash_of(const fs::path& run) {
  return core::parse_json(core::read_text(run / "summary.json"), "summary").at("hash");
}

/// Records with other bodies, each with a right checksum and in a right chain: what a journal's own checks cannot see.
void spoil_bodies(const fs::path& journal, Random& random) {
  auto records = coordinator::read_journal(journal);
  fs::remove(journal);
  coordinator::Journal out(journal);
  const size_t changed = random.below(records.size());
  for (size_t i = 0; i < records.size(); ++i) {
    if (i == changed && random.once_in(4)) continue;  // dropped
    if (i == changed) records[i].body = mutate_json(records[i].body, random);
    out.append(records[i].type, records[i].body);
    if (i == changed && random.once_in(4)) out.append(records[i].type, records[i].body);
  }
}

/// The files of a run that somebody or something may spoil, but its artefacts, whose hashes are their names.
std::vector<std::string> files_of(const fs::path& run) {
  std::vector<std::string> files;
  for (const auto& entry : fs::recursive_directory_iterator(run)) {
    const std::string name = fs::relative(entry.path(), run).string();
    if (entry.is_regular_file() && !name.starts_with("artefacts/") && !name.starts_with("tensorboard/") &&
        name != "lock")
      files.push_back(name);
  }
  std::sort(files.begin(), files.end());
  return files;
}

std::vector<Line> readers(const Example& example, const std::string& run, Scratch& scratch) {
  std::vector<Line> lines = {{"report", run},
                             {"report", run, "--format", "json"},
                             {"ls", run},
                             {"ls", run, "--format", "json"},
                             {"compare", run, World::get() / ("runs/" + example.name)},
                             {"inspect", run}};
  if (!example.unit.empty()) {
    lines.push_back({"cat", run, example.unit});
    lines.push_back({"cp", run, example.unit, scratch.out() / "unit.safetensors"});
    lines.push_back({"export", run, scratch.out(), "--to", "peft"});
  }
  return lines;
}

/// One file of the run spoilt, read by everything, then the same line of `run` again.
void feed(const Example& example, uint64_t usual) {
  limit_memory(uint64_t{4} << 30);
  const std::string run_name = "runs/" + example.name;
  const std::string undisturbed = hash_of(World::get() / run_name);
  const auto files = files_of(World::get() / run_name);
  Judge judge("run_" + example.name);
  for (uint64_t seed = first_seed(); seed < first_seed() + rounds(usual) && !judge.has_enough(); ++seed) {
    Scratch scratch({run_name});
    const fs::path run = scratch / run_name;
    Random random(seed);
    const std::string file = files[seed % files.size()];
    if (file.starts_with("journal/") && random.once_in(2))
      spoil_bodies(run / file, random);
    else
      scratch.spoil(run_name + "/" + file, random);
    for (const Line& line : readers(example, run, scratch)) judge.command(seed, run, line);
    Line again = {"run", World::get() / example.recipe, "--run-dir", run};
    again.insert(again.end(), example.overrides.begin(), example.overrides.end());
    if (judge.command(seed, run, again) == core::kExitOk && hash_of(run) != undisturbed)
      judge.find(seed, run, fmt::format("{} spoilt: run ended with 0 and another hash", file));
  }
}

class SpoiltRuns : public testing::Test {
 protected:
  static void SetUpTestSuite() { World::get(); }
};

TEST_F(SpoiltRuns, OfFlexmoreComeToTheSameOrAreRefused) { feed(kFlexmore, 200); }
TEST_F(SpoiltRuns, OfRoundsComeToTheSameOrAreRefused) { feed(kFederated, 100); }
TEST_F(SpoiltRuns, OfChainsComeToTheSameOrAreRefused) { feed(kContinual, 100); }

}  // namespace
}  // namespace moraine::fuzz
