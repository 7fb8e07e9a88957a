#include "algorithms/mergers/elementwise.h"

#include <cmath>

#include <ATen/TensorOperators.h>
#include <ATen/ops/kthvalue.h>
#include <ATen/ops/linalg_svd.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/zeros_like.h>

#include "algorithms/mergers/low_rank.h"
#include "core/error.h"
#include "core/hash.h"

namespace moraine::algorithms::mergers {
namespace {

uint64_t mask_seed(const Contribution& contribution, const MergeConfig& config, const std::string& tensor) {
  return core::derive_seed(static_cast<uint64_t>(config.seed.value_or(0)),
                           fmt::format("merge/{}/{}", contribution.identity, tensor));
}

void check_ranks(std::span<const Contribution> contributions, const std::string& type, const std::string& slot) {
  const Contribution& first = contributions.front();
  for (const Contribution& other : contributions)
    if (rank_of(other) != rank_of(first))
      throw core::UserError(fmt::format("algorithms/mergers: type {} needs equal ranks: '{}' has {} and '{}' {} at {}",
                                        type, first.name, rank_of(first), other.name, rank_of(other), slot),
                            "concat, svd and types that end in _svd take different ranks");
}

}  // namespace

ElementwiseMerger::ElementwiseMerger(std::string rule_name, std::string summary, ElementwiseRule rule, Traits traits,
                                     On on)
    : name_(std::move(rule_name)), summary_(std::move(summary)), rule_(rule), traits_(traits), on_(on) {
  if (on == On::kFactors) {
    summary_ += ", on A and on B by themselves";
    return;
  }
  name_ += on == On::kSvd ? "_svd" : "_dense";
  summary_ += on == On::kSvd ? ", on the changes, cut to a rank" : ", on the changes, which stay dense";
  traits_.takes_dense = true;
  traits_.rank = on == On::kSvd;
}

Merged ElementwiseMerger::merge_factors(std::span<const Contribution> contributions, const MergeConfig& config,
                                        const std::string& slot) const {
  check_ranks(contributions, name_, slot);
  Values a, b;
  for (const Contribution& contribution : contributions) {
    const Pair pair = pair_of(contribution);
    const double strength = contribution.weight * contribution.factors->scale, root = std::sqrt(std::abs(strength));
    a.tensors.push_back(pair.a);
    a.weights.push_back(strength < 0 ? -root : root);
    a.seeds.push_back(mask_seed(contribution, config, slot + ".lora_A"));
    b.tensors.push_back(pair.b);
    b.weights.push_back(root);
    b.seeds.push_back(mask_seed(contribution, config, slot + ".lora_B"));
  }
  return {adapters::Factored{{{rule_(b, config), rule_(a, config)}}}};
}

Merged ElementwiseMerger::merge_checked(std::span<const Contribution> contributions, const MergeConfig& config,
                                        const std::string& slot) const {
  if (on_ == On::kFactors) return merge_factors(contributions, config, slot);
  Values changes;
  for (const Contribution& contribution : contributions) {
    changes.tensors.push_back(change_of(contribution));
    changes.weights.push_back(contribution.weight);
    changes.seeds.push_back(mask_seed(contribution, config, slot));
  }
  const at::Tensor merged = rule_(changes, config);
  if (on_ == On::kDense) return {std::nullopt, merged};
  const auto [u, s, vt] = at::linalg_svd(merged, /*full_matrices=*/false);
  return leading({u, s, vt}, rank_of_result(contributions, config, slot));
}

at::Tensor sum_of(const Values& values) {
  at::Tensor sum = values.tensors.front() * values.weights.front();
  for (size_t i = 1; i < values.tensors.size(); ++i) sum.add_(values.tensors[i], values.weights[i]);
  return sum;
}

at::Tensor pruned(const at::Tensor& values, double density) {
  const int64_t numbers = values.numel();
  const auto kept = static_cast<int64_t>(density * static_cast<double>(numbers));
  if (kept >= numbers) return values;
  if (kept == 0) return at::zeros_like(values);
  const at::Tensor sizes = values.abs().flatten();
  const double smallest = std::get<0>(at::kthvalue(sizes, numbers - kept + 1)).item<double>();
  at::Tensor mask = sizes > smallest;
  const int64_t missing = kept - mask.sum().item<int64_t>();
  mask.index_fill_(0, at::nonzero(sizes == smallest).flatten().narrow(0, 0, missing), true);
  return values * mask.view(values.sizes());
}

}  // namespace moraine::algorithms::mergers
