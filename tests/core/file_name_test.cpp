#include "core/file_name.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/error.h"

namespace moraine::core {
namespace {

TEST(FileName, OneComponentOfAPathIsAccepted) {
  for (const std::string name : {"german", "Grüße 2", "..x", "-", "a.b", "mixture"})
    EXPECT_EQ(check_file_name(name, "an expert", "config.json"), name);
}

TEST(FileName, WhatLeavesTheDirectoryOrIsNoNameIsRefused) {
  for (const std::string name : {"", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "a\nb"})
    EXPECT_THROW(check_file_name(name, "an expert", "config.json"), UserError) << name;
  EXPECT_THROW(check_file_name(std::string("a\0b", 3), "an expert", "config.json"), UserError);
  EXPECT_THROW(check_file_name(std::string(201, 'x'), "an expert", "config.json"), UserError);
}

TEST(FileName, TheMessageSaysWhatWhereAndWhich) {
  try {
    check_file_name("../\xff", "an expert", "config.json");
    FAIL() << "accepted";
  } catch (const UserError& error) {
    EXPECT_THAT(error.what(), testing::StartsWith("config.json: the name of an expert cannot be a file name: \"../"));
    EXPECT_FALSE(error.hint().empty());
  }
}

}  // namespace
}  // namespace moraine::core
