#include "algorithms/objectives/labelled.h"

#include <algorithm>
#include <cmath>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/from_blob.h>

#include "core/error.h"

namespace moraine::algorithms::objectives {
namespace {

at::Tensor on_device(std::vector<int64_t>& labels, const at::Tensor& logits) {
  return at::from_blob(labels.data(), {static_cast<int64_t>(labels.size())}, at::kLong)
      .to(logits.device(), /*non_blocking=*/false, /*copy=*/true);
}

}  // namespace

at::Tensor class_loss(const at::Tensor& logits, std::vector<int64_t> labels, double label_smoothing) {
  return at::cross_entropy_loss(logits, on_device(labels, logits), {}, at::Reduction::Sum, -100, label_smoothing);
}

void require_finite(const Evaluation& sums, const std::string& name) {
  if (!std::isfinite(sums.nats))
    throw core::NumericError(fmt::format("algorithms: evaluation loss is not finite on '{}'", name),
                             "the evaluated model holds NaN or Inf; look at its training curve");
}

Evaluation score_classes(const std::vector<int64_t>& rows, const ScoredRows& scored, int64_t batch_size,
                         WorkerContext& context, const std::string& name,
                         const std::function<Scored(std::vector<int64_t>)>& logits) {
  const at::NoGradGuard no_grad;
  const auto [begin, stop] = scored.of(static_cast<int64_t>(rows.size()));
  Evaluation out;
  for (int64_t first = begin; first < stop; first += batch_size) {
    const int64_t end = std::min(stop, first + batch_size);
    Scored batch = logits({rows.begin() + first, rows.begin() + end});
    out.nats += class_loss(batch.logits, batch.labels, 0).item<double>();
    out.correct += at::argmax(batch.logits, 1).eq(on_device(batch.labels, batch.logits)).sum().item<int64_t>();
    out.tokens += end - first;
    context.progress(static_cast<double>(end - begin), static_cast<double>(stop - begin));
  }
  require_finite(out, name);
  return out;
}

}  // namespace moraine::algorithms::objectives
