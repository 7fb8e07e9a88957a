#include "algorithms/flexmore/comparisons.h"

#include <algorithm>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/linalg_qr.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/scatter.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>

#include "core/error.h"

namespace moraine::algorithms::flexmore {
namespace {

// Log-probabilities held at once over all members: 256 MB of float32.
constexpr int64_t kLogProbabilitiesAtOnce = int64_t{1} << 26;

}  // namespace

at::Tensor posterior_weights(const at::Tensor& log_likelihood, int64_t top) {
  MORAINE_CHECK(log_likelihood.dim() == 3 && top >= 1 && top <= log_likelihood.size(0),
                "posterior weights of [E, B, T], top in 1..E");
  const at::Tensor running = log_likelihood.to(at::kDouble).cumsum(2);
  const at::Tensor before =
      at::cat({at::zeros_like(running.slice(2, 0, 1)), running.slice(2, 0, running.size(2) - 1)}, 2);
  const at::Tensor posterior = at::softmax(before, 0);
  const at::Tensor order = std::get<1>(at::sort(posterior, /*stable=*/true, /*dim=*/0, /*descending=*/true));
  const at::Tensor kept = posterior * at::scatter(at::zeros_like(posterior), 0, order.slice(0, 0, top), 1.0);
  return kept / kept.sum(0, /*keepdim=*/true);
}

models::TokenLoss branch_train_merge_loss(std::vector<models::Decoder>& members, const at::Tensor& sequences,
                                          int64_t top) {
  const at::NoGradGuard no_grad;
  const int64_t length = sequences.size(1) - 1;
  const int64_t per_row = static_cast<int64_t>(members.size()) * length * members.front().config().vocab_size;
  const int64_t rows = std::max<int64_t>(1, kLogProbabilitiesAtOnce / per_row);
  models::TokenLoss loss;
  for (int64_t first = 0; first < sequences.size(0); first += rows) {
    const at::Tensor part = sequences.slice(0, first, std::min(first + rows, sequences.size(0)));
    const at::Tensor tokens = part.slice(1, 0, length).clamp_min(0).contiguous(), targets = part.slice(1, 1);
    const at::Tensor counted = targets.ge(0), index = targets.clamp_min(0).unsqueeze(2);
    std::vector<at::Tensor> all, own;
    for (models::Decoder& member : members) {
      all.push_back(at::log_softmax(member.forward(tokens).to(at::kFloat), -1));
      own.push_back(at::gather(all.back(), 2, index).squeeze(2).to(at::kDouble) * counted);
    }
    const at::Tensor likelihood = at::stack(own),
                     weights = posterior_weights(likelihood, std::min(top, static_cast<int64_t>(members.size())));
    const at::Tensor sum = -(at::logsumexp(weights.log() + likelihood, {0}) * counted).sum();
    at::Tensor mixed;
    for (size_t e = 0; e < all.size(); ++e) {
      const at::Tensor share = weights[static_cast<int64_t>(e)].to(at::kFloat).unsqueeze(2) * all[e].exp();
      mixed = mixed.defined() ? mixed + share : share;
    }
    loss.sum = loss.sum.defined() ? loss.sum + sum : sum;
    loss.count += counted.sum().item<int64_t>();
    loss.correct += (at::argmax(mixed, -1).eq(targets)).sum().item<int64_t>();
  }
  return loss;
}

Expert with_scaled_change(Expert expert, const models::Decoder& base, double scale) {
  for (size_t l = 0; l < expert.layers.size(); ++l) {
    models::FfnExpert& ffn = expert.layers[l];
    MORAINE_CHECK(ffn.full(), "only a full-size expert's change is scaled");
    const models::SlotBase& frozen = base.base(ffn_slot(l));
    const auto scaled = [&](const at::Tensor& tuned, const at::Tensor& from) {
      const at::Tensor start = from.cpu().to(at::kDouble);
      return (start + scale * (tuned.to(at::kDouble) - start)).to(tuned.scalar_type());
    };
    ffn.gate = scaled(ffn.gate, frozen.gate);
    ffn.up = scaled(ffn.up, frozen.up);
    ffn.down = scaled(ffn.down, frozen.down);
  }
  return expert;
}

models::LowRank random_subspace_of(const at::Tensor& tuned, const at::Tensor& base, int64_t rank, uint64_t seed) {
  const int64_t in = tuned.size(1);
  if (rank < 1 || rank > in)
    throw core::UserError(
        fmt::format("algorithms/flexmore: a subspace of rank {} does not fit into {} inputs", rank, in),
        "choose smaller ranks.candidates");
  auto generator = at::detail::createCPUGenerator(seed);
  const at::Tensor random = at::empty({in, rank}, at::kDouble).normal_(0, 1, generator);
  const at::Tensor basis = std::get<0>(at::linalg_qr(random));
  const at::Tensor difference = tuned.to(at::kDouble) - base.to(at::kDouble);
  return {basis.t().to(at::kFloat).contiguous(), at::matmul(difference, basis).to(at::kFloat).contiguous()};
}

Line least_squares_line(const std::vector<std::pair<double, double>>& points) {
  const auto n = static_cast<double>(points.size());
  double mean_x = 0, mean_y = 0, xx = 0, xy = 0, yy = 0;
  for (const auto& [x, y] : points) mean_x += x / n, mean_y += y / n;
  for (const auto& [x, y] : points) {
    xx += (x - mean_x) * (x - mean_x);
    xy += (x - mean_x) * (y - mean_y);
    yy += (y - mean_y) * (y - mean_y);
  }
  MORAINE_CHECK(points.size() >= 2 && xx > 0, "a line needs two different x");
  const double slope = xy / xx;
  return {slope, mean_y - slope * mean_x, yy > 0 ? slope * xy / yy : 1};
}

}  // namespace moraine::algorithms::flexmore
