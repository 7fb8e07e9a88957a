#include "algorithms/evaluate.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>

#include "core/error.h"

namespace moraine::algorithms {

double Evaluation::bits_per_byte() const { return nats / std::numbers::ln2 / static_cast<double>(bytes); }

core::Json Evaluation::to_json() const {
  return {{"nats", nats}, {"tokens", tokens}, {"bytes", bytes}, {"correct", correct}};
}

std::optional<std::string> Evaluation::impossible() const {
  if (std::isfinite(nats) && tokens > 0 && bytes >= 0 && correct >= 0 && correct <= tokens) return std::nullopt;
  return fmt::format("holds impossible sums: {}", to_json().dump());
}

Evaluation Evaluation::from_json(const core::Json& json) {
  return {json.at("nats").get<double>(), json.at("tokens").get<int64_t>(), json.at("bytes").get<int64_t>(),
          json.at("correct").get<int64_t>()};
}

std::pair<int64_t, int64_t> ScoredRows::of(int64_t size) const {
  const int64_t all = count ? std::min(count, size) : size;
  return {all * member / members, all * (member + 1) / members};
}

Evaluation evaluate(models::Decoder& model, const data::TextDataset& dataset, const ScoredRows& sequences,
                    int64_t batch_size, WorkerContext& context) {
  return evaluate([&](const at::Tensor& batch) { return model.loss(batch, /*count_correct=*/true); }, dataset,
                  sequences, batch_size, context);
}

Evaluation evaluate(const BatchLoss& score, const data::TextDataset& dataset, const ScoredRows& sequences,
                    int64_t batch_size, WorkerContext& context) {
  const at::NoGradGuard no_grad;
  const auto [begin, end] = sequences.of(dataset.num_eval_sequences());
  Evaluation out;
  for (int64_t first = begin; first < end; first += batch_size) {
    const int64_t count = std::min(batch_size, end - first);
    std::vector<int64_t> rows = dataset.eval_batch(first, count);
    const at::Tensor batch = at::from_blob(rows.data(), {count, dataset.seq_len() + 1}, at::kLong).to(context.device());
    const models::TokenLoss loss = score(batch);
    out.nats += loss.sum.item<double>();
    out.tokens += loss.count;
    out.correct += loss.correct;
    out.bytes += dataset.eval_bytes(first, count);
    context.progress(static_cast<double>(first + count - begin), static_cast<double>(end - begin));
  }
  if (!std::isfinite(out.nats))
    throw core::NumericError(fmt::format("algorithms: evaluation loss is not finite on '{}'", dataset.info().name),
                             "the evaluated model holds NaN or Inf; look at its training curve");
  return out;
}

}  // namespace moraine::algorithms
