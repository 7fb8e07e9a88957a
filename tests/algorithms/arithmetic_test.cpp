#include "algorithms/arithmetic.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "algorithms/run_config.h"
#include "core/error.h"
#include "kernels/processor.h"
#include "kernels/types.h"

namespace moraine::algorithms {
namespace {

using testing::HasSubstr;

core::ConfigNode recipe_with(const std::string& arithmetic) {
  using Kind = core::ConfigNode::Kind;
  core::ConfigNode workers{.kind = Kind::kMap}, recipe{.kind = Kind::kMap};
  workers.members.emplace_back("arithmetic", core::ConfigNode{.kind = Kind::kScalar, .text = arithmetic});
  workers.member_origins.push_back("test");
  recipe.members.emplace_back("workers", workers);
  recipe.member_origins.push_back("test");
  return recipe;
}

std::string named_in(const core::ConfigNode& recipe) { return recipe.find("workers")->find("arithmetic")->text; }

TEST(Arithmetic, NativeIsNamedByTheProcessorAndOurKernels) {
  const kernels::Processor& here = kernels::processor();
  EXPECT_EQ(native_arithmetic().rfind(fmt::format("native {}-{}-{} {}", here.vendor, here.family, here.model,
                                                  kernels::path_name(kernels::best_path())),
                                      0),
            0u)
      << native_arithmetic();
}

TEST(Arithmetic, WhatNarrowsTheLibrariesIsPartOfTheName) {
  const char* variable = "MKL_DEBUG_CPU_TYPE";  // which this MKL ignores
  const std::string before = native_arithmetic();
  setenv(variable, "5", 1);
  const std::string narrowed = native_arithmetic();
  unsetenv(variable);
  EXPECT_EQ(narrowed, before + " MKL_DEBUG_CPU_TYPE=5");
}

TEST(Arithmetic, ARecipeThatSaysNothingOrNativeGetsTheName) {
  core::Problems problems;
  for (core::ConfigNode recipe : {core::ConfigNode{.kind = core::ConfigNode::Kind::kMap}, recipe_with("native"),
                                  recipe_with(native_arithmetic())}) {
    name_arithmetic(recipe, problems);
    EXPECT_EQ(named_in(recipe), native_arithmetic());
  }
  core::ConfigNode portable = recipe_with("portable");
  name_arithmetic(portable, problems);
  EXPECT_EQ(named_in(portable), "portable");
  EXPECT_TRUE(problems.empty());
}

TEST(Arithmetic, TheNameOfAnotherProcessorIsAProblem) {
  core::Problems problems;
  core::ConfigNode recipe = recipe_with("native AnotherMaker-1-2 avx9");
  name_arithmetic(recipe, problems);
  try {
    problems.throw_if_any("recipe");
    FAIL() << "accepted";
  } catch (const core::UserError& error) {
    EXPECT_THAT(error.what(), HasSubstr(native_arithmetic()));
  }
}

TEST(Arithmetic, IsPartOfEveryUnitsIdentityWhereItIsKnown) {
  WorkersConfig workers;
  EXPECT_FALSE(compute_identity(workers).contains("arithmetic")) << "ids of runs recorded before there was a choice";
  for (const char* name : {"portable", "native GenuineIntel-6-60 avx2"}) {
    workers.arithmetic = name;
    EXPECT_EQ(compute_identity(workers).at("arithmetic"), name);
  }
  EXPECT_TRUE(compute_identity(workers).contains("device"));
}

TEST(Arithmetic, AProcessDoesNotChangeIt) {
  use_arithmetic("native");
  use_arithmetic(native_arithmetic());
  try {
    use_arithmetic("portable");
    FAIL() << "changed";
  } catch (const core::UserError& error) {
    EXPECT_THAT(error.what(), HasSubstr("cannot change to 'portable'"));
  }
  EXPECT_THAT(arithmetic_facts().at("kernels").get<std::string>(), kernels::path_name(kernels::best_path()));
}

}  // namespace
}  // namespace moraine::algorithms
