#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

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

/// Teacher-forced evaluation of the first `sequences` (0 = all) evaluation sequences of a split, without gradients.
/// Sums are kept in double in file order, so the result depends on batch_size only through the model's own rounding.
/// Throws NumericError if the loss is not finite.
Evaluation evaluate(models::Decoder& model, const data::TextDataset& dataset, int64_t sequences, int64_t batch_size,
                    WorkerContext& context);

/// The same for whatever scores a batch [B, T + 1] of sequences as Decoder::loss does.
using BatchLoss = std::function<models::TokenLoss(const at::Tensor& sequences)>;
Evaluation evaluate(const BatchLoss& loss, const data::TextDataset& dataset, int64_t sequences, int64_t batch_size,
                    WorkerContext& context);

}  // namespace moraine::algorithms
