#include "algorithms/adapters/python_regex.h"

#include <gtest/gtest.h>

#include "core/error.h"

namespace moraine::algorithms::adapters {
namespace {

// What Python 3.11's re.fullmatch says.
TEST(PythonRegex, MatchesWhatPythonMatches) {
  struct Case {
    const char *pattern, *path;
    bool matches;
  };
  const std::string unsloth =
      R"((?:.*?(?:language|text).*?(?:q_proj|k_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|up_proj))))";
  for (const Case& c : {Case{".*q_proj", "model.layers.0.self_attn.q_proj", true},
                        {"q_proj", "model.layers.0.self_attn.q_proj", false},
                        {"^(?!.*visual).*(?:q_proj|attn).*$", "model.visual.blocks.3.attn", false},
                        {"^(?!.*visual).*(?:q_proj|attn).*$", "model.layers.0.self_attn.q_proj", true},
                        {unsloth.c_str(), "model.layers.11.mlp.up_proj", true},
                        {unsloth.c_str(), "model.layers.11.mlp.down_proj", false},
                        {"(?P<part>[a-z_]+)\\Z", "lm_head", true},
                        {"\\Alm_head", "lm_head", true},
                        {"x{y}", "x{y}", true},
                        {"a{,2}", "aa", true},
                        {"a{,2}", "aaa", false},
                        {"[]a]+", "a]a", true},
                        {"[^]a]", "]", false},
                        {"[[:a]+", ":[a", true},
                        {"(a|a)*b", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaac", false}})
    EXPECT_EQ(python_full_match(c.pattern, c.path), c.matches) << c.pattern << " on " << c.path;
}

TEST(PythonRegex, WhatWouldBeReadDifferentlyIsRefused) {
  for (const char* pattern : {"(?i)Q_PROJ", "(?<=a)b", "(?<!a)b", "(a)\\1", "(?P<n>a)(?P=n)", "(?P<n>a)(?P<n>b)",
                              "(?>a)b", "a*+", "a++", "a**", "\\z", "\\N", "[\\b]", "\xc3\xa9", "[", "(", "a\\", "*a"})
    EXPECT_THROW(python_full_match(pattern, "a"), core::UserError) << pattern;
  EXPECT_THROW(python_full_match(".*", std::string(100000, 'a')), core::UserError);
}

}  // namespace
}  // namespace moraine::algorithms::adapters
