#include "core/registry.h"

#include <gtest/gtest.h>

namespace moraine::core {
namespace {

TEST(EditDistance, EqualsHandCountedValues) {
  EXPECT_EQ(edit_distance("", "abc"), 3);
  EXPECT_EQ(edit_distance("kitten", "sitting"), 3);
  EXPECT_EQ(edit_distance("steps", "stpes"), 1);  // one transposition
  EXPECT_EQ(edit_distance("ca", "abc"), 3);       // optimal string alignment, not 2: no part is edited twice
}

TEST(NearestName, AllowsAThirdOfTheLengthInEdits) {
  const std::vector<std::string> names = {"alpha", "rank", "learning_rate"};
  EXPECT_EQ(nearest_name("rnak", names), "rank");
  EXPECT_EQ(nearest_name("x", names), "");
  EXPECT_EQ(nearest_name("lerning_rat", names), "learning_rate");
  EXPECT_EQ(nearest_name("rabc", names), "");  // 2 edits, 4 letters allow 1
}

TEST(NameHint, ListsCandidatesSorted) {
  const std::vector<std::string> names = {"rank", "alpha"};
  EXPECT_EQ(name_hint("rnak", names), "did you mean 'rank'? Valid: alpha, rank");
  EXPECT_EQ(name_hint("colour", names), "valid: alpha, rank");
  EXPECT_EQ(name_hint("colour", {}), "valid: none");
}

}  // namespace
}  // namespace moraine::core
