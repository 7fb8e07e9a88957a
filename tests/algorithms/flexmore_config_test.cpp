#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "algorithms/register.h"
#include "core/error.h"
#include "tests/models/random_tensors.h"
#include "tests/temporary_directory.h"

namespace moraine::algorithms {
namespace {

using testing::AllOf;
using testing::HasSubstr;

std::string problems_with(const std::vector<std::string>& overrides) {
  return models::thrown<core::UserError>(
      [&] { load_recipe(std::string(MORAINE_SOURCE_DIR) + "/recipes/flexmore/olmo2-7b.yaml", overrides); });
}

TEST(FlexMoreRecipe, ReportsAllProblemsAtOnceWithWhereTheyAre) {
  EXPECT_THAT(problems_with({"trian.steps=5", "train.steps=many", "ranks.budget=2"}),
              AllOf(HasSubstr("trian"), HasSubstr("train"), HasSubstr("many"), HasSubstr("ranks.budget"),
                    HasSubstr("command line")));
}

TEST(FlexMoreRecipe, RefusesRanksThatAreNoRanks) {
  EXPECT_THAT(problems_with({"domains.0.rank=0"}), HasSubstr("rank must be positive: 0"));
  EXPECT_THAT(problems_with({"domains.0.rank=-4"}), HasSubstr("rank must be positive: -4"));
  EXPECT_THAT(problems_with({"domains.0.rank=big"}), HasSubstr("auto, full or a number"));
  EXPECT_THAT(problems_with({"ranks.candidates=[4, -8]"}), HasSubstr("-8"));
}

TEST(FlexMoreRecipe, RefusesMoreActiveExpertsThanThereAre) {
  EXPECT_THAT(problems_with({"top_k=8"}), HasSubstr("top_k 8 is more than the 7 experts"));
}

TEST(FlexMoreRecipe, RefusesToLeaveOutEverything) {
  EXPECT_THAT(problems_with({"leave_out=[code, creative, math, news, academic, reddit]"}),
              HasSubstr("leaves no expert"));
  EXPECT_THAT(problems_with({"leave_out=[codes]"}), HasSubstr("no domain 'codes'"));
}

TEST(FlexMoreRecipe, RefusesTwoDomainsOfOneName) {
  EXPECT_THAT(problems_with({"domains.1.name=code"}), HasSubstr("'code' stands twice"));
}

TEST(FlexMoreRecipe, RefusesListsThatNameOneThingTwice) {
  EXPECT_THAT(problems_with({"ranks.candidates=[8, 8, 4]"}), AllOf(HasSubstr("ranks.candidates"), HasSubstr("twice")));
  EXPECT_THAT(problems_with({"leave_out=[code, code]"}), AllOf(HasSubstr("leave_out"), HasSubstr("twice")));
  EXPECT_THAT(problems_with({"comparisons=[btm, btm]"}), AllOf(HasSubstr("comparisons"), HasSubstr("twice")));
}

TEST(FlexMoreRecipe, AMissingModelIsNamedByItsKeys) {
  const TemporaryDirectory folder;
  const auto recipe = folder.write("recipe.yaml", "name: bare\nmethod: flexmore\n");
  EXPECT_THAT(models::thrown<core::UserError>([&] { load_recipe(recipe, {}); }),
              AllOf(HasSubstr("model is missing"), HasSubstr("model.path"), HasSubstr("model.architecture")));
}

TEST(FlexMoreRecipe, APublicModelIsTrainedInFloat32) {
  EXPECT_THAT(problems_with({"model.train={dtype: bfloat16}"}), HasSubstr("train.dtype must be float32"));
}

TEST(FlexMoreRecipe, AComparisonNeedsNothingOfDomainsThatAreLeftOut) {
  EXPECT_EQ(
      problems_with({"comparisons=[rank_sweep]", "domains.0.train=direct", "domains.0.rank=\"8\"", "leave_out=[code]"}),
      "");
  EXPECT_THAT(problems_with({"domains=[]", "comparisons=[btm]"}), HasSubstr("comparisons need domains"));
}

TEST(FlexMoreRecipe, DirectTrainingNeedsARank) {
  EXPECT_THAT(problems_with({"domains.0.train=direct"}), HasSubstr("needs a number as rank"));
}

TEST(FlexMoreRecipe, ComparisonsAreNamedAndNeedWhatTheyCompare) {
  EXPECT_THAT(problems_with({"comparisons=[bmt]"}), AllOf(HasSubstr("bmt"), HasSubstr("btm")));
  EXPECT_THAT(problems_with({"comparisons=[rank_sweep]", "domains.0.train=direct", "domains.0.rank=\"8\""}),
              AllOf(HasSubstr("rank_sweep needs full-size experts"), HasSubstr("'code'")));
}

TEST(FlexMoreRecipe, RunningOnShapesAloneNamesEveryMissingInput) {
  auto recipe =
      load_recipe(std::string(MORAINE_SOURCE_DIR) + "/recipes/flexmore/olmo2-7b.yaml", {"domains.0.rank=5000"});
  EXPECT_THAT(models::thrown<core::UserError>([&] { recipe.method->open_inputs(); }),
              AllOf(HasSubstr("public_path"), HasSubstr("domains.0.path"), HasSubstr("domains.5.path"),
                    HasSubstr("model.train"), HasSubstr("rank 5000 is above 4096")));
}

TEST(FlexMoreRecipe, UnknownMethodsNameTheNearest) {
  EXPECT_THAT(problems_with({"method=flexmroe"}), HasSubstr("'flexmore'"));
}

}  // namespace
}  // namespace moraine::algorithms
