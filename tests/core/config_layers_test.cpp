// Where values come from: defaults files, the recipe, the environment, the command line, references.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/config.h"
#include "core/error.h"
#include "tests/temporary_directory.h"

namespace moraine::core {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

// The tree as text: scalars with their origin's file or layer, maps and lists as JSON does.
std::string show(const ConfigNode& node) {
  std::string text;
  switch (node.kind) {
    case ConfigNode::Kind::kNull:
      return "null";
    case ConfigNode::Kind::kScalar:
      return node.text;
    case ConfigNode::Kind::kList:
      for (const auto& item : node.items) text += (text.empty() ? "" : ", ") + show(item);
      return "[" + text + "]";
    case ConfigNode::Kind::kMap:
      break;
  }
  for (const auto& [key, value] : node.members) text += (text.empty() ? "" : ", ") + key + ": " + show(value);
  return "{" + text + "}";
}

class ConfigLayersTest : public testing::Test {
 protected:
  ConfigNode load(const std::string& yaml, std::vector<std::string> overrides = {}) {
    const auto path = directory_.write("r.yaml", yaml);
    Problems problems;
    auto node = load_config(path, overrides, problems);
    lines_.clear();
    try {
      problems.throw_if_any("r.yaml");
    } catch (const UserError& error) {
      std::istringstream stream(error.what());
      const std::string prefix = directory_.path().string() + "/";
      std::string line;
      std::getline(stream, line);
      while (std::getline(stream, line)) {
        for (size_t at = line.find(prefix); at != std::string::npos; at = line.find(prefix))
          line.erase(at, prefix.size());
        lines_.push_back(line.substr(2));
      }
    }
    return node;
  }
  TemporaryDirectory directory_;
  std::vector<std::string> lines_;
};

TEST_F(ConfigLayersTest, BytesThatAreNoUtf8AreNamedWhereTheyStand) {
  try {
    load("a: 1\nname: gr\xFCn\n");
    FAIL() << "read Latin-1";
  } catch (const UserError& error) {
    EXPECT_THAT(error.what(), HasSubstr("r.yaml:2:9: not UTF-8: byte 0xfc"));
  }
  ::setenv("MORAINE_TEST_BYTES", "gr\xFCn", 1);
  load("a: ${env:MORAINE_TEST_BYTES}\n", {"b=gr\xFCn", "c\xFC=1"});
  ::unsetenv("MORAINE_TEST_BYTES");
  EXPECT_THAT(lines_, ElementsAre(HasSubstr("command line: b: not UTF-8"), HasSubstr("command line: c\xEF\xBF\xBD"),
                                  HasSubstr("MORAINE_TEST_BYTES is not UTF-8")));
  EXPECT_EQ(show(load(std::string("\xFF\xFE") + std::string("a\0:\0 \0\xFC\0\n\0", 10))), "{a: \xC3\xBC}") << "UTF-16";
}

TEST_F(ConfigLayersTest, LaterLayersWinKeyByKey) {
  directory_.write("deep/first.yaml", "a: 1\nb: 1\nc: 1\nd: 1\ne: 1\nm: {x: 1, y: 1}\nl: [1, 2, 3]\n");
  directory_.write("second.yaml", "defaults: [deep/first.yaml]\nb: 2\nc: 2\nd: 2\ne: 2\n");
  ::setenv("MORAINE_D", "4", 1);
  ::setenv("MORAINE_E", "4", 1);
  ::setenv("MORAINE_M__Y", "4", 1);
  ::setenv("MORAINE_F", "", 1);
  ::setenv("MORAINE_LOG", "debug", 1);   // not a recipe key
  ::setenv("MORAINE_SKIP_APT", "1", 1);  // neither
  ::setenv("MORAINE_THREADS", "2", 1);   // of scripts/moraine.sbatch
  const auto node = load("defaults: [second.yaml]\nc: 3\nd: 3\ne: 3\nl: [9]\n", {"e=5", "n.new.key=[x, 5]", "l.0=7"});
  for (const char* name :
       {"MORAINE_D", "MORAINE_E", "MORAINE_M__Y", "MORAINE_F", "MORAINE_LOG", "MORAINE_SKIP_APT", "MORAINE_THREADS"})
    ::unsetenv(name);
  EXPECT_THAT(lines_, ElementsAre());
  EXPECT_EQ(show(node), "{a: 1, b: 2, c: 3, d: 4, e: 5, m: {x: 1, y: 4}, l: [7], n: {new: {key: [x, 5]}}}");
  EXPECT_EQ(node.find("a")->origin, (directory_ / "deep/first.yaml").string() + ":1:4");
  EXPECT_EQ(node.find("c")->origin, (directory_ / "r.yaml").string() + ":2:4");
  EXPECT_EQ(node.find("d")->origin, "environment MORAINE_D");
  EXPECT_EQ(node.find("e")->origin, "command line");
}

TEST_F(ConfigLayersTest, DefaultsThatCannotBeReadAreProblems) {
  directory_.write("a.yaml", "defaults: [b.yaml]\n");
  directory_.write("b.yaml", "defaults: [a.yaml]\n");
  load("defaults: [a.yaml, none.yaml, r.yaml]\n");
  EXPECT_THAT(lines_,
              ElementsAre("b.yaml:1:12: defaults: a.yaml includes itself (remove one of the two)",
                          "r.yaml:1:20: defaults: no such file: none.yaml (the path is relative to this recipe)",
                          "r.yaml:1:31: defaults: r.yaml includes itself (remove one of the two)"));
  load("defaults: a.yaml\n");
  EXPECT_THAT(lines_,
              ElementsAre("r.yaml:1:11: defaults: must be a list of recipe files (write defaults: [file.yaml])"));
}

TEST_F(ConfigLayersTest, MissingRecipeIsAUserError) {
  Problems problems;
  EXPECT_THROW(load_config(directory_ / "none.yaml", {}, problems), UserError);
}

TEST_F(ConfigLayersTest, MalformedOverridesSayHowToWriteThem) {
  load("a: 1\nl: [{k: 1}, {k: 2}]\n", {"a", "=5", "x..y=1", "a.b=1", "l.2.k=1", "l.k=1", "b=[", "l.1.k=3"});
  EXPECT_THAT(lines_, ElementsAre("command line: 'a' is not an override (write key.sub=value)",
                                  "command line: '=5' is not an override (write key.sub=value)",
                                  "command line: x..y: a path has an empty part (write key.sub=value)",
                                  "command line: a.b: a is '1' and has no keys below it (check the path)",
                                  "command line: l.2.k: '2' is not an index into l (l has 2 items, counted from 0)",
                                  "command line: l.k: 'k' is not an index into l (l has 2 items, counted from 0)",
                                  "command line: b: the value is not YAML: '[' (quote it, as in key='\"value\"')"));
}

TEST_F(ConfigLayersTest, ReferencesKeepTheTypeOfTheWholeValue) {
  ::setenv("USER_OF_TEST", "me", 1);
  const auto node =
      load("a: ${b.c}\nb: {c: [1, '${d}']}\nd: 5\ne: \"${env:USER_OF_TEST}/${d}/$${d}\"\nf: ${a.1}\n", {"g=${b}"});
  EXPECT_THAT(lines_, ElementsAre());
  EXPECT_EQ(show(node), "{a: [1, 5], b: {c: [1, 5]}, d: 5, e: me/5/${d}, f: 5, g: {c: [1, 5]}}");
  EXPECT_FALSE(node.find("f")->quoted) << "a quoted reference to a number is a number";
  EXPECT_TRUE(node.find("e")->quoted);
}

TEST_F(ConfigLayersTest, ReferencesThatLeadNowhereAreProblems) {
  load(
      "steps: 5\na: ${stpes}\nb: ${c}\nc: x${b}\nd: ${d.e}\ne: ${env:NOT_SET_ANYWHERE}\nf: ${steps\ng: x${m}\nm:\n  k: "
      "${m}\n");
  EXPECT_THAT(
      lines_,
      ElementsAre("r.yaml:2:4: a: ${stpes}: no such key in the recipe (did you mean 'steps'?)",
                  "r.yaml:4:4: c: ${b} refers to itself (write the value in one of the two places)",
                  HasSubstr("r.yaml:5:4: d: ${d.e}: no such key in the recipe"),
                  "r.yaml:6:4: e: environment variable NOT_SET_ANYWHERE is not set (export NOT_SET_ANYWHERE=...)",
                  "r.yaml:7:4: f: '${' without '}' (write $${ for a literal ${)",
                  "r.yaml:10:6: m.k: ${m} refers to itself (write the value in one of the two places)",
                  "r.yaml:8:4: g: ${m} is no scalar and cannot stand inside text"));
}

TEST_F(ConfigLayersTest, PathsStartAtTheFileTheyStandIn) {
  struct Paths {
    std::string from_default, from_recipe, absolute, from_command_line, empty = "";
  };
  const auto schema = Schema<Paths>()
                          .field("from_default", &Paths::from_default)
                          .path()
                          .field("from_recipe", &Paths::from_recipe)
                          .path()
                          .field("absolute", &Paths::absolute)
                          .path()
                          .field("from_command_line", &Paths::from_command_line)
                          .path()
                          .field("empty", &Paths::empty)
                          .path();
  directory_.write("deep/base.yaml", "from_default: ../data\n");
  const auto node =
      load("defaults: [deep/base.yaml]\nfrom_recipe: x/./y\nabsolute: /a/b\nempty: ''\n", {"from_command_line=here"});
  Problems problems;
  Paths paths;
  schema.parse(node, "", paths, problems);
  EXPECT_TRUE(problems.empty());
  EXPECT_EQ(paths.from_default, directory_ / "data");
  EXPECT_EQ(paths.from_recipe, directory_ / "x/y");
  EXPECT_EQ(paths.absolute, "/a/b");
  EXPECT_EQ(paths.from_command_line, std::filesystem::current_path() / "here");
  EXPECT_EQ(paths.empty, "");
}

}  // namespace
}  // namespace moraine::core
