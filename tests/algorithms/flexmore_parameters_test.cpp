#include <map>

#include <gtest/gtest.h>

#include "algorithms/register.h"

namespace moraine::algorithms {
namespace {

ParameterTable olmo2_7b() {
  return load_recipe(std::string(MORAINE_SOURCE_DIR) + "/recipes/flexmore/olmo2-7b.yaml", {}).method->parameters();
}

core::Json cell(const std::string& model, const core::Json& rank, size_t column) {
  for (const auto& row : olmo2_7b().rows)
    if (row[0] == model && row[1] == rank) return row[column];
  return "no such row";
}

TEST(FlexMoreParameters, FullSizeMixturesOfSevenAndTwoExpertsHaveThePublishedCounts) {
  EXPECT_EQ(cell("full-size experts", "full", 5), 33'270'665'216);
  EXPECT_EQ(cell("full-size experts", "full", 4), 11'627'401'216);
  EXPECT_EQ(cell("public model", nullptr, 5), 7'298'617'344);
}

// FlexMoRE (arXiv 2602.08818), table of ranks; totals there are rounded to 0.1 M, so the unit counts come from the
// closed form N = S + F + E L d + r 3 (d + h) L with S = 2,970,095,616, F = 4,328,521,728, L d = 131,072, 3 (d + h) L =
// 1,449,984.
TEST(FlexMoreParameters, EveryRowOfTheRankTableIsExact) {
  const std::map<int64_t, std::pair<double, double>> published = {
      // rank -> billions in total with 2 and 7 experts
      {1, {7.3003, 7.3082}},     {2, {7.3018, 7.3169}},    {4, {7.3047, 7.3343}},     {8, {7.3105, 7.3691}},
      {16, {7.3221, 7.4387}},    {32, {7.3453, 7.5779}},   {64, {7.3917, 7.8563}},    {128, {7.4845, 8.4131}},
      {256, {7.6701, 9.5267}},   {512, {8.0413, 11.7539}}, {1024, {8.7837, 16.2082}}, {2048, {10.2684, 25.1169}},
      {4096, {13.2380, 42.9343}}};
  for (const auto& [rank, totals] : published) {
    const int64_t adapter = rank * 1'449'984;
    EXPECT_EQ(cell("low-rank experts", rank, 2), adapter) << "rank " << rank;
    const auto two = cell("low-rank experts", rank, 4).get<int64_t>(),
               seven = cell("low-rank experts", rank, 5).get<int64_t>();
    EXPECT_EQ(two, 7'298'617'344 + 2 * 131'072 + adapter);
    EXPECT_EQ(seven, 7'298'617'344 + 7 * 131'072 + 6 * adapter);
    EXPECT_NEAR(static_cast<double>(two) / 1e9, totals.first, 0.00005001);  // half a unit of the last printed digit
    EXPECT_NEAR(static_cast<double>(seven) / 1e9, totals.second, 0.00005001);
  }
}

TEST(FlexMoreParameters, ARecipeWithRanksCountsItsOwnMixture) {
  const auto recipe = load_recipe(std::string(MORAINE_SOURCE_DIR) + "/recipes/flexmore/olmo2-7b.yaml",
                                  {"domains.0.rank=16", "domains.1.rank=32", "domains.2.rank=64", "domains.3.rank=16",
                                   "domains.4.rank=64", "domains.5.rank=32"});
  EXPECT_EQ(recipe.method->parameters().rows.back().back(), 7'624'331'264);  // the follow-up's chosen ranks, sum 224
}

}  // namespace
}  // namespace moraine::algorithms
