#include "cli/prompt.h"

#include <chrono>

#include <CLI/CLI.hpp>

#include "cli/output.h"
#include "coordinator/report/table.h"
#include "core/error.h"
#include "core/log.h"
#include "data/model_tokenizer.h"

namespace moraine::cli {
namespace {

void print_score(models::Decoder& model, const Prompt& prompt, const PromptArguments& arguments, bool json) {
  const auto score = algorithms::score_prompt(model, prompt.tokens, *prompt.tokenizer);
  core::Json row = {{"loss", score.loss()},
                    {"bits_per_byte", score.bits_per_byte()},
                    {"accuracy", score.accuracy()},
                    {"tokens", score.tokens},
                    {"bytes", score.bytes}};
  if (json) {
    row["prompt"] = arguments.text, row["prompt_tokens"] = prompt.tokens;
    return print_json(row);
  }
  print(report::render_table(
      report::plain_table("The prompt, from its second token on",
                          {"loss", "bits_per_byte", "accuracy", "tokens", "bytes"}, core::Json::array({row})),
      table_style()));
}

void print_continuation(models::Decoder& model, const Prompt& prompt, const PromptArguments& arguments, bool json,
                        algorithms::WorkerContext& context) {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  auto first = start;
  int64_t seen = 0;
  const auto on_token = [&](int64_t token) {
    if (seen++ == 0) first = Clock::now();
    if (!json) print(prompt.tokenizer->decode(std::span(&token, 1), /*skip_special=*/false));
  };
  const auto result = algorithms::generate(model, prompt.tokens, arguments.sampling,
                                           {.max_new_tokens = arguments.new_tokens, .end_of_text = prompt.end_of_text},
                                           on_token, context);
  const std::chrono::duration<double> until_first = first - start, after = Clock::now() - first;
  if (json)
    print_json({{"prompt", arguments.text},
                {"prompt_tokens", prompt.tokens},
                {"text", prompt.tokenizer->decode(result.tokens, /*skip_special=*/false)},
                {"tokens", result.tokens},
                {"stopped", algorithms::name_of(result.stopped)}});
  else
    print("\n");
  core::log::info("prompt continued: stopped={} prompt_tokens={} tokens={} first_token_ms={:.0f} tokens_per_s={:.1f}",
                  algorithms::name_of(result.stopped), prompt.tokens.size(), seen, until_first.count() * 1e3,
                  seen > 1 ? static_cast<double>(seen - 1) / after.count() : 0.0);
}

}  // namespace

void add_prompt_options(CLI::App& command, PromptArguments& a, const std::vector<std::string>& data_options) {
  auto* prompt = command.add_option("--prompt", a.text, "A text: prints its score (nats per token, bits per byte)");
  for (const auto& name : data_options) prompt->excludes(command.get_option(name));
  auto* generate = command
                       .add_option("--generate", a.new_tokens,
                                   "Writes on after the prompt instead, up to so many tokens; without a number 64")
                       ->expected(0, 1)
                       ->default_str("64")
                       ->type_name("[N]")
                       ->check(CLI::PositiveNumber)
                       ->needs(prompt);
  command
      .add_option("--special-tokens", a.special_tokens,
                  "recognised | text: whether a prompt that spells a special token means it")
      ->check(CLI::IsMember({"recognised", "text"}))
      ->capture_default_str()
      ->needs(prompt);
  auto* temperature =
      command.add_option("--temperature", a.sampling.temperature, "Draw tokens at this temperature; 0 = the likeliest")
          ->check(CLI::NonNegativeNumber)
          ->capture_default_str()
          ->needs(generate);
  command.add_option("--top-k", a.sampling.top_k, "Draw from the k likeliest tokens; 0 = all")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str()
      ->needs(temperature);
  command.add_option("--top-p", a.sampling.top_p, "Draw from the fewest tokens that hold this much of the probability")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str()
      ->needs(temperature);
  command.add_option("--seed", a.sampling.seed, "Of the draws: the same seed gives the same text")
      ->capture_default_str()
      ->needs(temperature);
}

Prompt read_prompt(const PromptArguments& arguments, const std::filesystem::path& directory) {
  if (arguments.text.empty())
    throw core::UserError("cli: the prompt is empty", "give --prompt a text of one character or more");
  const auto config = models::DecoderConfig::from_directory(directory);
  Prompt prompt;
  prompt.tokenizer = data::model_tokenizer(directory, config.vocab_size);
  prompt.tokens = prompt.tokenizer->prefix();
  for (const int64_t token :
       prompt.tokenizer->encode(arguments.text, arguments.special_tokens == "text" ? data::SpecialTokens::kText
                                                                                   : data::SpecialTokens::kRecognised))
    prompt.tokens.push_back(token);
  prompt.end_of_text = algorithms::end_of_text_tokens(directory, config, *prompt.tokenizer);
  return prompt;
}

void answer_prompt(models::Decoder& model, const Prompt& prompt, const PromptArguments& arguments, bool json,
                   algorithms::WorkerContext& context) {
  if (arguments.new_tokens > 0)
    print_continuation(model, prompt, arguments, json, context);
  else
    print_score(model, prompt, arguments, json);
}

}  // namespace moraine::cli
