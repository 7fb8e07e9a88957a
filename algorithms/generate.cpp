#include "algorithms/generate.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>

#include "core/error.h"
#include "core/hash.h"
#include "core/json.h"
#include "models/kv_cache.h"

namespace moraine::algorithms {
namespace {

// [1, T] without a copy.
at::Tensor as_batch(std::span<const int64_t> tokens, at::Device device) {
  return at::from_blob(const_cast<int64_t*>(tokens.data()), {1, static_cast<int64_t>(tokens.size())}, at::kLong)
      .to(device);
}

std::vector<double> finite_values(const at::Tensor& logits) {
  const at::Tensor values = logits.detach().to(at::kCPU, at::kDouble).contiguous();
  const double* first = values.const_data_ptr<double>();
  std::vector<double> out(first, first + values.numel());
  if (!std::all_of(out.begin(), out.end(), [](double value) { return std::isfinite(value); }))
    throw core::NumericError("algorithms: the model's logits are not finite",
                             "the model holds NaN or Inf; look at its training curve");
  return out;
}

void check(const Sampling& sampling) {
  if (!(sampling.temperature >= 0 && std::isfinite(sampling.temperature)))
    throw core::UserError(fmt::format("algorithms: no temperature: {}", sampling.temperature),
                          "0 takes the likeliest token, 1 draws by the model's own probabilities");
  if (sampling.top_k < 0 || !(sampling.top_p > 0 && sampling.top_p <= 1))
    throw core::UserError(
        fmt::format("algorithms: nothing to draw from: top_k {}, top_p {}", sampling.top_k, sampling.top_p),
        "top_k is 0 (all) or more, top_p above 0 and at most 1");
  if (sampling.temperature == 0 && (sampling.top_k != 0 || sampling.top_p != 1))
    throw core::UserError("algorithms: top_k and top_p have no meaning at temperature 0",
                          "give a temperature above 0, or leave them out");
}

// Uniform in [0, 1), of 53 bits.
double uniform(uint64_t seed, int64_t step) {
  return static_cast<double>(core::derive_seed(seed, fmt::format("generate/{}", step)) >> 11) * 0x1p-53;
}

}  // namespace

int64_t choose_token(const at::Tensor& logits, const Sampling& sampling, int64_t step) {
  const std::vector<double> values = finite_values(logits);
  if (sampling.temperature == 0) return std::max_element(values.begin(), values.end()) - values.begin();
  std::vector<int64_t> ids(values.size());
  std::iota(ids.begin(), ids.end(), 0);
  std::stable_sort(ids.begin(), ids.end(), [&](int64_t a, int64_t b) { return values[a] > values[b]; });
  if (sampling.top_k > 0 && sampling.top_k < std::ssize(ids)) {
    const double weakest = values[ids[sampling.top_k - 1]];
    ids.erase(std::find_if(ids.begin() + sampling.top_k, ids.end(), [&](int64_t id) { return values[id] < weakest; }),
              ids.end());
  }
  std::vector<double> weights;
  for (const int64_t id : ids) weights.push_back(std::exp((values[id] - values[ids.front()]) / sampling.temperature));
  if (sampling.top_p < 1) {
    const double wanted = sampling.top_p * std::accumulate(weights.begin(), weights.end(), 0.0);
    double sum = 0;
    const auto enough = std::find_if(weights.begin(), weights.end(), [&](double w) { return (sum += w) >= wanted; });
    if (enough != weights.end()) weights.erase(enough + 1, weights.end());
  }
  double left = uniform(sampling.seed, step) * std::accumulate(weights.begin(), weights.end(), 0.0);
  size_t chosen = 0;
  while (chosen + 1 < weights.size() && left >= weights[chosen]) left -= weights[chosen++];
  return ids[chosen];
}

const char* name_of(StopReason reason) {
  switch (reason) {
    case StopReason::kEndOfText:
      return "end_of_text";
    case StopReason::kMaxNewTokens:
      return "max_new_tokens";
    case StopReason::kContext:
      return "context";
  }
  throw core::InternalError("algorithms: no such reason to stop");
}

Generation generate(models::Decoder& model, std::span<const int64_t> prompt, const Sampling& sampling,
                    const GenerationLimits& limits, const std::function<void(int64_t token)>& on_token,
                    WorkerContext& context) {
  const auto length = static_cast<int64_t>(prompt.size()), room = model.config().max_position_embeddings - length;
  check(sampling);
  if (prompt.empty()) throw core::UserError("algorithms: the prompt is empty", "give a prompt of one token or more");
  if (room < 1)
    throw core::UserError(fmt::format("algorithms: the prompt fills the model's context of {} tokens: {}",
                                      model.config().max_position_embeddings, length),
                          "shorten the prompt");
  models::KeyValueCache cache;
  Generation out;
  at::Tensor logits = model.next_logits(as_batch(prompt, model.device()), cache);
  while (true) {
    const int64_t step = std::ssize(out.tokens), token = choose_token(logits, sampling, step);
    if (std::ranges::count(limits.end_of_text, token) > 0) {
      out.stopped = StopReason::kEndOfText;
      return out;
    }
    out.tokens.push_back(token);
    on_token(token);
    context.progress(static_cast<double>(step + 1), static_cast<double>(limits.max_new_tokens));
    if (std::ssize(out.tokens) >= std::min(limits.max_new_tokens, room)) {
      out.stopped = limits.max_new_tokens <= room ? StopReason::kMaxNewTokens : StopReason::kContext;
      return out;
    }
    logits = model.next_logits(as_batch({&out.tokens.back(), 1}, model.device()), cache);
  }
}

Evaluation score_prompt(models::Decoder& model, std::span<const int64_t> prompt, const data::Tokenizer& tokenizer) {
  const auto length = static_cast<int64_t>(prompt.size());
  if (length < 2)
    throw core::UserError(fmt::format("algorithms: nothing predicts the first token of a prompt; tokens: {}", length),
                          "give a longer prompt, or let the model write on with --generate");
  if (length > model.config().max_position_embeddings)
    throw core::UserError(fmt::format("algorithms: the prompt has {} tokens, the model's context {}", length,
                                      model.config().max_position_embeddings),
                          "shorten the prompt, or prepare it as a data set and evaluate that by --data");
  const at::NoGradGuard no_grad;
  const models::TokenLoss loss = model.loss(as_batch(prompt, model.device()), /*count_correct=*/true);
  Evaluation out;
  out.nats = loss.sum.item<double>();
  out.tokens = loss.count;
  out.correct = loss.correct;
  out.bytes = std::ssize(tokenizer.decode(prompt.subspan(1), /*skip_special=*/false));
  if (!std::isfinite(out.nats))
    throw core::NumericError("algorithms: the loss of the prompt is not finite",
                             "the model holds NaN or Inf; look at its training curve");
  return out;
}

std::vector<int64_t> end_of_text_tokens(const std::filesystem::path& directory, const models::DecoderConfig& config,
                                        const data::Tokenizer& tokenizer) {
  core::Json ids = config.eos_token_id;
  std::filesystem::path origin = directory / "config.json";
  if (const auto path = directory / "generation_config.json"; std::filesystem::exists(path)) {
    const core::Json own = core::read_json(path);
    if (own.is_object() && !own.value("eos_token_id", core::Json()).is_null())
      ids = own.at("eos_token_id"), origin = path;
  }
  if (ids.is_null()) {
    const auto end = tokenizer.end_of_text();
    return end ? std::vector<int64_t>{*end} : std::vector<int64_t>{};
  }
  if (!ids.is_array()) ids = core::Json::array({ids});
  for (const core::Json& id : ids)
    if (!id.is_number_integer() || id < 0 || id >= config.vocab_size)
      throw core::UserError(
          fmt::format("algorithms: eos_token_id is no token of the model: {} ({})", id.dump(), origin.string()),
          "name one token id or a list of them");
  return ids.get<std::vector<int64_t>>();
}

}  // namespace moraine::algorithms
