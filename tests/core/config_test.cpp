#include "core/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "tests/temporary_directory.h"

namespace moraine::core {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

struct Schedule {
  std::string kind = "cosine";
  double final_ratio = 0.1;
};
struct Train {
  int64_t steps = 10;
  double learning_rate = 1e-3;
  std::optional<int64_t> cap;
  std::vector<int64_t> ranks;
  std::vector<std::string> modules;
  bool shuffle = false;
  Schedule schedule;
};
struct Domain {
  std::string name;
  int64_t rank = 4;
};
struct Recipe {
  std::string name = "unnamed";
  Train train;
  std::vector<Domain> domains;
  std::optional<Schedule> extra;
};

const Schema<Recipe>& recipe_schema() {
  static const auto schedule = Schema<Schedule>()
                                   .field("kind", &Schedule::kind)
                                   .choices({"cosine", "linear"})
                                   .field("final_ratio", &Schedule::final_ratio)
                                   .min(0)
                                   .max(1);
  static const auto train = Schema<Train>()
                                .field("steps", &Train::steps)
                                .min(1)
                                .doc("Optimiser steps")
                                .field("learning_rate", &Train::learning_rate)
                                .above(0)
                                .field("cap", &Train::cap)
                                .min(1)
                                .field("modules", &Train::modules)
                                .joined_later()
                                .field("ranks", &Train::ranks)
                                .min(0)
                                .field("shuffle", &Train::shuffle)
                                .object("schedule", &Train::schedule, schedule)
                                .check([](const Train& value) -> std::optional<std::string> {
                                  if (value.cap && *value.cap < value.steps) return "cap must not be below steps";
                                  return std::nullopt;
                                });
  static const auto domain =
      Schema<Domain>().field("name", &Domain::name).required().field("rank", &Domain::rank).min(1).unit("dimensions");
  static const auto recipe = Schema<Recipe>()
                                 .field("name", &Recipe::name)
                                 .object("train", &Recipe::train, train)
                                 .list("domains", &Recipe::domains, domain)
                                 .optional_object("extra", &Recipe::extra, schedule);
  return recipe;
}

class ConfigTest : public testing::Test {
 protected:
  // Reads a recipe; problems, if any, as lines without the directory.
  Recipe read(const std::string& yaml) {
    const auto path = directory_.write("r.yaml", yaml);
    Problems problems;
    Recipe recipe;
    lines_.clear();
    try {
      node_ = load_config(path, {}, problems);
      recipe_schema().parse(node_, "", recipe, problems);
      problems.throw_if_any("r.yaml");
    } catch (const UserError& error) {
      std::istringstream stream(error.what());
      const std::string prefix = directory_.path().string() + "/";
      for (std::string line; std::getline(stream, line);) {
        for (size_t at = line.find(prefix); at != std::string::npos; at = line.find(prefix))
          line.erase(at, prefix.size());
        lines_.push_back(line.substr(std::min(line.find_first_not_of(' '), line.size())));
      }
    }
    return recipe;
  }
  // The only problem of one line under `train:`.
  std::string problem(const std::string& line) {
    read("train:\n  " + line + "\n");
    return lines_.size() == 2 ? lines_[1] : fmt::format("{} lines", lines_.size());
  }
  TemporaryDirectory directory_;
  ConfigNode node_;
  std::vector<std::string> lines_;
};

TEST_F(ConfigTest, FillsEveryKindOfField) {
  const Recipe recipe = read(R"(
name: 12
train:
  steps: +200
  learning_rate: 3e-4
  cap: 300
  ranks: [4, 8]
  shuffle: true
  schedule: {kind: linear, final_ratio: 0}
domains:
- {name: german, rank: 8}
- name: "null"
extra: {}
)");
  EXPECT_THAT(lines_, ElementsAre());
  EXPECT_EQ(recipe_schema().to_json(recipe), Json::parse(R"({"name": "12",
    "train": {"steps": 200, "learning_rate": 0.0003, "cap": 300, "ranks": [4, 8], "shuffle": true, "schedule": {"kind": "linear", "final_ratio": 0.0}},
    "domains": [{"name": "german", "rank": 8}, {"name": "null", "rank": 4}], "extra": {"kind": "cosine", "final_ratio": 0.1}})"));
}

TEST_F(ConfigTest, EmptyRecipeKeepsTheDefaults) {
  EXPECT_EQ(recipe_schema().to_json(read("")), recipe_schema().to_json(Recipe{}));
  EXPECT_EQ(recipe_schema().to_json(read("train:\nextra: null\n")), recipe_schema().to_json(Recipe{}));
  EXPECT_THAT(lines_, ElementsAre());
}

TEST_F(ConfigTest, ReportsAllProblemsAtOnceWithTheirPlaces) {
  read(R"(nmae: x
train:
  stpes: 5
  learning_rate: 0
  cap: 20
  schedule: {kind: cosin, final_ratio: 1.5}
domains:
- rank: 0
- german
)");
  EXPECT_THAT(
      lines_,
      ElementsAre(
          "r.yaml: 8 problems",
          "r.yaml:1:1: nmae: unknown key (did you mean 'name'? Valid: domains, extra, name, train)",
          "r.yaml:3:3: train.stpes: unknown key (did you mean 'steps'? Valid: cap, learning_rate, modules, ranks, "
          "schedule, shuffle, steps)",
          "r.yaml:4:18: train.learning_rate: must be above 0, found 0.0",
          "r.yaml:6:20: train.schedule.kind: 'cosin' is not one of the choices (did you mean 'cosine'? Valid: "
          "cosine, linear)",
          "r.yaml:6:40: train.schedule.final_ratio: must be at most 1, found 1.5",
          "r.yaml:8:3: domains.0.name: is required", "r.yaml:8:9: domains.0.rank: must be at least 1, found 0",
          "r.yaml:9:3: domains.1: must be a map of keys, found 'german'"));
}

TEST_F(ConfigTest, CrossFieldRulesNameTheirObject) {
  read("train:\n  steps: 30\n  cap: 20\n");
  EXPECT_THAT(lines_, ElementsAre("r.yaml: 1 problem", "r.yaml:2:3: train: cap must not be below steps"));
}

TEST_F(ConfigTest, IntegersAreDecimalAndExact) {
  EXPECT_EQ(problem("steps: 010"),
            "r.yaml:2:10: train.steps: must be an integer, found '010' (leading zeros mean octal in YAML; write 10)");
  EXPECT_EQ(problem("steps: 0x10"),
            "r.yaml:2:10: train.steps: must be an integer, found '0x10' (write the number in decimal)");
  EXPECT_EQ(problem("steps: 1e5"), "r.yaml:2:10: train.steps: must be an integer, found '1e5' (write 100000)");
  EXPECT_EQ(problem("steps: 1_000"),
            "r.yaml:2:10: train.steps: must be an integer, found '1_000' (write digits without '_')");
  EXPECT_EQ(problem("steps: 1.5"), "r.yaml:2:10: train.steps: must be an integer, found '1.5'");
  EXPECT_EQ(problem("steps: 9223372036854775808"),
            "r.yaml:2:10: train.steps: must be an integer, found '9223372036854775808' (it must fit in 64 bits)");
  EXPECT_EQ(problem("steps: \"5\""),
            "r.yaml:2:10: train.steps: must be an integer, found the text \"5\" (remove the quotes)");
  EXPECT_EQ(problem("steps:"),
            "r.yaml:2:3: train.steps: must be an integer, found nothing (give a value, or remove the key to use its "
            "default)");
  EXPECT_EQ(problem("steps: [1]"), "r.yaml:2:10: train.steps: must be an integer, found a list");
}

TEST_F(ConfigTest, NumbersAreFinite) {
  EXPECT_EQ(problem("learning_rate: .nan"),
            "r.yaml:2:18: train.learning_rate: must be a number, found '.nan' (it must be finite)");
  EXPECT_EQ(problem("learning_rate: -.inf"),
            "r.yaml:2:18: train.learning_rate: must be a number, found '-.inf' (it must be finite)");
  EXPECT_EQ(problem("learning_rate: 1e999"), "r.yaml:2:18: train.learning_rate: must be a number, found '1e999'");
  EXPECT_EQ(
      problem("learning_rate: 00.5"),
      "r.yaml:2:18: train.learning_rate: must be a number, found '00.5' (leading zeros mean octal in YAML; write .5)");
  EXPECT_EQ(read("train: {learning_rate: 2}").train.learning_rate, 2.0);
}

TEST_F(ConfigTest, BooleansAndListsAreSpelledOneWay) {
  EXPECT_EQ(problem("shuffle: yes"), "r.yaml:2:12: train.shuffle: must be true or false, found 'yes'");
  EXPECT_EQ(problem("ranks: 5"), "r.yaml:2:10: train.ranks: must be a list, found '5' (write [5])");
  EXPECT_EQ(read("train: {modules: all-linear}").train.modules, std::vector<std::string>{"all-linear"});
  EXPECT_EQ(problem("ranks: [1, -2]"), "r.yaml:2:14: train.ranks.1: must be at least 0, found -2");
}

TEST_F(ConfigTest, RefusesWhatYamlReadersDisagreeAbout) {
  read("train: &t {steps: 1}\nextra: *t\n");
  EXPECT_THAT(lines_,
              ElementsAre("r.yaml: 1 problem",
                          "r.yaml:2:8: extra: aliases are not supported (refer to the key itself: ${key.path})"));
  read("name: a\ntrain:\n  <<: {steps: 1}\nname: b\n");
  EXPECT_THAT(lines_,
              ElementsAre("r.yaml: 2 problems",
                          "r.yaml:3:3: train.<<: merge keys are not supported (list the shared file under defaults:, "
                          "or write ${key.path})",
                          "r.yaml:4:1: name: the key stands twice, first at r.yaml:1:1 (remove one of the two)"));
  EXPECT_EQ(
      problem("steps: !!int 5"),
      "r.yaml:2:10: train.steps: the tag tag:yaml.org,2002:int is not supported (remove it; a key's type is fixed)");
  EXPECT_EQ(problem("? [a]\n  : 1"), "r.yaml:2:5: train: a key must be text");
  read("name: a\n---\nname: b\n");
  EXPECT_THAT(lines_, ElementsAre("r.yaml: 1 problem", HasSubstr("more than one YAML document")));
}

TEST_F(ConfigTest, SyntaxErrorsNameTheirPlace) {
  read("train:\n  steps: [1, 2\n");
  ASSERT_EQ(lines_.size(), 1U);
  EXPECT_THAT(lines_[0], testing::StartsWith("r.yaml:3:1: not YAML: "));
  read("- a list\n");
  EXPECT_THAT(lines_,
              ElementsAre("r.yaml: 1 problem", "r.yaml:1:1: a recipe is a map of keys (start with key: value)"));
}

TEST_F(ConfigTest, JsonReadsBackStrictly) {
  const Recipe recipe =
      read("{name: 'true', train: {learning_rate: 1e-30, ranks: [1]}, domains: [{name: '5'}], extra: {kind: linear}}");
  const Json json = recipe_schema().to_json(recipe);
  EXPECT_EQ(recipe_schema().to_json(recipe_schema().from_json(json)), json);
  const auto complaint = [&](const char* pointer, const Json& value) -> std::string {
    Json changed = json;
    if (value.is_discarded())
      changed[Json::json_pointer(pointer).parent_pointer()].erase(Json::json_pointer(pointer).back());
    else
      changed[Json::json_pointer(pointer)] = value;
    try {
      recipe_schema().from_json(changed);
    } catch (const UserError& error) {
      return error.what();
    }
    return "accepted";
  };
  EXPECT_THAT(complaint("/train/steps", "5"), HasSubstr("train.steps: must be an integer, found the text \"5\""));
  EXPECT_THAT(complaint("/train/steps", 0), HasSubstr("train.steps: must be at least 1, found 0"));
  EXPECT_THAT(complaint("/train/more", 0), HasSubstr("train.more: unknown key"));
  EXPECT_THAT(complaint("/domains/0/rank", Json(Json::value_t::discarded)), HasSubstr("domains.0.rank: is missing"));
}

TEST_F(ConfigTest, ResolvedYamlReadsBackToTheSameValuesAndNamesOrigins) {
  const std::string yaml =
      "name: 'a: \"$${b}\" #c'\ntrain: {ranks: [1, 2]}\ndomains:\n- {name: 'no'}\n- {name: b, rank: 7}\n";
  const Recipe recipe = read(yaml);
  std::vector<ResolvedValue> values;
  recipe_schema().resolve(node_, "", recipe, values);
  const std::string resolved = resolved_yaml(values);
  EXPECT_THAT(resolved, HasSubstr("  steps: 10  # default\n"));
  EXPECT_THAT(resolved, HasSubstr("    rank: 7  # " + (directory_ / "r.yaml").string() + ":5:19\n"));
  EXPECT_EQ(recipe_schema().to_json(read(resolved)), recipe_schema().to_json(recipe)) << resolved;
  EXPECT_THAT(lines_, ElementsAre()) << resolved;
}

TEST_F(ConfigTest, SchemaAndDocsComeFromTheTable) {
  const Json schema = recipe_schema().json_schema();
  EXPECT_EQ(schema["additionalProperties"], false);
  const Json& train = schema["properties"]["train"]["anyOf"][0];
  EXPECT_EQ(train["properties"]["steps"]["anyOf"][0], (Json{{"type", "integer"}, {"minimum", 1.0}}));
  EXPECT_EQ(train["properties"]["learning_rate"]["anyOf"][0], (Json{{"type", "number"}, {"exclusiveMinimum", 0.0}}));
  EXPECT_EQ(schema["properties"]["domains"]["items"]["anyOf"][0]["required"], Json({"name"}));
  const std::string markdown = recipe_schema().markdown();
  EXPECT_THAT(markdown, HasSubstr("| `train.steps` | integer | 10 | >= 1 | Optimiser steps |\n"));
  EXPECT_THAT(markdown, HasSubstr("| `train.schedule.kind` | text | cosine | one of cosine, linear |  |\n"));
  EXPECT_THAT(markdown, HasSubstr("| `domains.N.rank` | integer (dimensions) | 4 | >= 1 |  |\n"));
}

}  // namespace
}  // namespace moraine::core
