#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>
#include <vector>

#include "algorithms/evaluate.h"
#include "algorithms/worker_context.h"
#include "data/tokenizer.h"
#include "models/decoder.h"

namespace moraine::algorithms {

/// How the next token is chosen: the likeliest at temperature 0, else drawn from softmax(logits / temperature) cut to
/// the top_k likeliest and then to the fewest of these that hold top_p of the probability (the order of transformers'
/// `generate`; tokens as likely as the k-th stay).
struct Sampling {
  double temperature = 0;  // raising it flattens the distribution; 0 = greedy
  int64_t top_k = 0;       // 0 = all
  double top_p = 1;        // in (0, 1]; 1 = all
  uint64_t seed = 0;       // the draw of a step is a function of (seed, step) alone
};

/// The token chosen at `step` (0 = the first new token); logits [V] in any dtype. Of equally likely tokens the smallest
/// id comes first. Throws NumericError if a logit is NaN or infinite.
int64_t choose_token(const at::Tensor& logits, const Sampling& sampling, int64_t step);

enum class StopReason { kEndOfText, kMaxNewTokens, kContext };
/// "end_of_text", "max_new_tokens", "context".
const char* name_of(StopReason reason);

struct Generation {
  std::vector<int64_t> tokens;  // new ones, without the end of text
  StopReason stopped = StopReason::kMaxNewTokens;
};

struct GenerationLimits {
  int64_t max_new_tokens = 64;
  std::vector<int64_t> end_of_text = {};  // any of these ends the text
};

/// Writes on after `prompt`, token by token with a key-value cache; `on_token` sees every token of the result as soon
/// as it is known. Stops at an end of text, after max_new_tokens, or when prompt and new tokens fill the model's
/// context. Without gradients. Throws UserError on an empty prompt, on one that leaves no room in the context and on a
/// sampling out of range; whatever context.progress() throws ends it.
Generation generate(models::Decoder& model, std::span<const int64_t> prompt, const Sampling& sampling,
                    const GenerationLimits& limits, const std::function<void(int64_t token)>& on_token,
                    WorkerContext& context);

/// Sums over a prompt's tokens but the first, which nothing predicts; their bytes are those the tokenizer spells them
/// with. Throws UserError if the prompt has fewer than two tokens or more than the context, NumericError if the loss is
/// not finite.
Evaluation score_prompt(models::Decoder& model, std::span<const int64_t> prompt, const data::Tokenizer& tokenizer);

/// The tokens that end a text: eos_token_id, a number or a list, of the directory's generation_config.json where it has
/// one, else of the model's config.json, else the tokenizer's own. Throws UserError if the former names no tokens.
std::vector<int64_t> end_of_text_tokens(const std::filesystem::path& directory, const models::DecoderConfig& config,
                                        const data::Tokenizer& tokenizer);

}  // namespace moraine::algorithms
