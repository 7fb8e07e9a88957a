#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <utility>

#include "algorithms/worker_context.h"
#include "core/json.h"
#include "data/text_dataset.h"
#include "models/decoder.h"

namespace moraine::algorithms {

/// Sums over the evaluated sequences; ratios are taken when a report is made.
struct Evaluation {
  double nats = 0;      // summed next-token cross entropy
  int64_t tokens = 0;   // predicted tokens
  int64_t bytes = 0;    // bytes of text they stand for
  int64_t correct = 0;  // argmax hits

  double bits_per_byte() const;
  double loss() const { return nats / static_cast<double>(tokens); }
  double accuracy() const { return static_cast<double>(correct) / static_cast<double>(tokens); }
  /// Why these cannot be sums over a text, nullopt when they can.
  std::optional<std::string> impossible() const;
  core::Json to_json() const;
  static Evaluation from_json(const core::Json& json);
};

/// Which rows of a split are scored: the first `count` (0 = all), and of these one member's share of a group.
struct ScoredRows {
  int64_t count = 0;
  int64_t member = 0, members = 1;

  ScoredRows(int64_t rows) : count(rows) {}
  ScoredRows(int64_t rows, int64_t index, int64_t size) : count(rows), member(index), members(size) {}
  /// [begin, end) of a split of `size` rows.
  std::pair<int64_t, int64_t> of(int64_t size) const;
};

/// Teacher-forced evaluation of some evaluation sequences of a split, without gradients.
/// Sums are kept in double in file order, so the result depends on batch_size only through the model's own rounding.
/// Throws NumericError if the loss is not finite.
Evaluation evaluate(models::Decoder& model, const data::TextDataset& dataset, const ScoredRows& sequences,
                    int64_t batch_size, WorkerContext& context);

/// The same for whatever scores a batch [B, T + 1] of sequences as Decoder::loss does.
using BatchLoss = std::function<models::TokenLoss(const at::Tensor& sequences)>;
Evaluation evaluate(const BatchLoss& loss, const data::TextDataset& dataset, const ScoredRows& sequences,
                    int64_t batch_size, WorkerContext& context);

}  // namespace moraine::algorithms
