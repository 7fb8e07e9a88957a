#include "core/json.h"

#include <gtest/gtest.h>

#include "core/error.h"
#include "tests/temporary_directory.h"

namespace moraine::core {
namespace {

std::string complaint(const std::string& text) {
  try {
    parse_json(text, "x.json");
  } catch (const UserError& error) {
    return error.what();
  }
  return "accepted";
}

TEST(Json, DumpDoesNotDependOnKeyOrder) {
  EXPECT_EQ(parse_json(R"({"b":1,"a":[2.50]})", "x").dump(), parse_json(R"({"a":[2.5], "b":1})", "y").dump());
}

TEST(Json, ErrorsNameLineAndColumn) {
  EXPECT_EQ(complaint("{\"a\": 1,\n  oops}").rfind("x.json:2:3: not valid JSON: ", 0), 0U)
      << complaint("{\"a\": 1,\n  oops}");
}

TEST(Json, RefusesAKeyThatStandsTwice) {
  EXPECT_EQ(complaint(R"({"a":{"k":1},"b":{"k":1}})"), "accepted");
  EXPECT_EQ(complaint(R"({"a":{"k":1,"k":2}})"), "x.json: key 'k' stands twice in one object");
}

TEST(Json, RefusesNumbersThatNothingHolds) {
  EXPECT_EQ(complaint("[1e308, -1e308, 18446744073709551615]"), "accepted");
  EXPECT_EQ(complaint("[1e999]"), "x.json: a number does not fit in 64 bits");
}

// Parsing needs no stack, but whoever walks the document does.
TEST(Json, RefusesValuesTooDeepInsideEachOther) {
  const auto nested = [](size_t depth) { return std::string(depth, '[') + std::string(depth, ']'); };
  EXPECT_EQ(complaint(nested(128)), "accepted");
  EXPECT_EQ(complaint(nested(130)), "x.json: values stand more than 128 levels inside each other");
  EXPECT_EQ(complaint(nested(1000000)), "x.json: values stand more than 128 levels inside each other");
}

TEST(Json, MissingFileIsTheUsersToFix) {
  const TemporaryDirectory directory;
  EXPECT_THROW(read_json(directory / "none.json"), UserError);
  EXPECT_THROW(read_json(directory.path()), UserError);
}

}  // namespace
}  // namespace moraine::core
