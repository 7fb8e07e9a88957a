#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "algorithms/evaluate.h"
#include "algorithms/worker_context.h"

namespace moraine::algorithms::objectives {

/// Logits [B, classes] and the labels they should choose.
struct Scored {
  at::Tensor logits;
  std::vector<int64_t> labels;
};

/// Summed cross entropy.
at::Tensor class_loss(const at::Tensor& logits, std::vector<int64_t> labels, double label_smoothing);

/// Sums over the `scored` of `rows`: nats and hits; one target each, no bytes.
Evaluation score_classes(const std::vector<int64_t>& rows, const ScoredRows& scored, int64_t batch_size,
                         WorkerContext& context, const std::string& name,
                         const std::function<Scored(std::vector<int64_t>)>& logits);

/// Throws NumericError if `sums` are not finite.
void require_finite(const Evaluation& sums, const std::string& name);

}  // namespace moraine::algorithms::objectives
