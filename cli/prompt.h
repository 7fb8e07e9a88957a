#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "algorithms/generate.h"
#include "data/tokenizer.h"

namespace CLI {
class App;
}

// `moraine eval --prompt`: a text's score, or what a model writes after it.
namespace moraine::cli {

struct PromptArguments {
  std::string text, special_tokens = "recognised";
  int64_t new_tokens = 0;  // 0 = score the prompt
  algorithms::Sampling sampling;
};

/// Adds --prompt and what goes with it; --prompt excludes the `data_options`.
void add_prompt_options(CLI::App& command, PromptArguments& arguments, const std::vector<std::string>& data_options);

/// A prompt in the tokens of a model directory, with the prefix its tokeniser wants.
struct Prompt {
  std::unique_ptr<const data::Tokenizer> tokenizer;
  std::vector<int64_t> tokens, end_of_text;
};

/// Throws UserError on an empty prompt and on a directory without a tokeniser, before any weight is read.
Prompt read_prompt(const PromptArguments& arguments, const std::filesystem::path& directory);

/// Prints the prompt's score, or with new_tokens the continuation while it is produced; one JSON document if `json`.
void answer_prompt(models::Decoder& model, const Prompt& prompt, const PromptArguments& arguments, bool json,
                   algorithms::WorkerContext& context);

}  // namespace moraine::cli
