#include "algorithms/hetlora/hetlora.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/zeros.h>

#include "algorithms/federated/federated.h"

namespace moraine::algorithms::hetlora {
namespace {

using federated::Factors;
using federated::PruningConfig;

int64_t tail_start(int64_t rank, const PruningConfig& config) {
  return std::max(config.min_rank, static_cast<int64_t>(std::floor(config.gamma * static_cast<double>(rank))));
}

// sum over slots of ||B[:, q:]||_F ||A[q:, :]||_F; undefined when there is no tail.
at::Tensor tail_product(const Factors& factors, const PruningConfig& config) {
  at::Tensor sum;
  for (const auto& [name, a] : factors) {
    if (!name.ends_with(".lora_A.weight")) continue;
    const int64_t rank = a.size(0), q = tail_start(rank, config);
    if (q >= rank) return {};
    const at::Tensor& b = factors.at(name.substr(0, name.size() - 13) + "lora_B.weight");
    // The norm's gradient at zero (B starts there) is NaN in ATen only for the plain square root; vector_norm gives 0.
    const at::Tensor product =
        at::linalg_vector_norm(b.narrow(1, q, rank - q)) * at::linalg_vector_norm(a.narrow(0, q, rank - q));
    sum = sum.defined() ? sum + product : product;
  }
  return sum;
}

// ||B A||_F over all slots without forming B A: the sum of A o ((B^T B) A).
double norm_of_update(const federated::Contribution& contribution, const std::vector<std::string>& slots) {
  double squares = 0;
  for (const std::string& slot : slots) {
    const at::Tensor a = contribution.factor(slot + ".lora_A.weight").to(at::kDouble);
    const at::Tensor b = contribution.factor(slot + ".lora_B.weight").to(at::kDouble);
    squares += (a * b.t().matmul(b).matmul(a)).sum().item<double>();
  }
  return std::sqrt(std::max(0.0, squares));
}

class HetLora final : public federated::Federation {
 public:
  static constexpr const char* kName = "hetlora";
  bool mixed_ranks() const override { return true; }
  bool weighs_as_told() const override { return false; }
  bool prunes() const override { return true; }

  at::Tensor penalty(const Factors& factors, const PruningConfig& config) const override {
    if (config.lambda == 0) return {};
    const at::Tensor tail = tail_product(factors, config);
    return tail.defined() ? tail * config.lambda : tail;
  }

  int64_t rank_after(const Factors& before, const Factors& after, int64_t rank,
                     const PruningConfig& config) const override {
    const at::NoGradGuard no_grad;
    const at::Tensor was = tail_product(before, config), is = tail_product(after, config);
    return is.defined() && is.item<double>() < was.item<double>() ? tail_start(rank, config) : rank;
  }

  federated::GlobalState aggregate(const federated::Round& round) const override {
    const std::vector<std::string> slots = round.slots();
    std::vector<double> weights;
    for (const auto& contribution : round.contributions) weights.push_back(norm_of_update(contribution, slots));
    const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
    for (double& weight : weights) weight = total > 0 ? weight / total : 1.0 / static_cast<double>(weights.size());
    federated::GlobalState next;
    next.weights = weights;
    for (const auto& [name, x] : round.global) {
      const int64_t side = name.ends_with("lora_A.weight") ? 0 : 1;
      at::Tensor sum = at::zeros(x.sizes(), at::kDouble);
      for (size_t k = 0; k < weights.size(); ++k) {
        const at::Tensor factor = round.contributions[k].factor(name);
        sum.narrow(side, 0, factor.size(side)).add_(factor.to(at::kDouble), weights[k]);
      }
      next.factors[name] =
          federated::server_step(round.optimizer, name, x, sum.to(at::kFloat), round.server, next.server);
    }
    return next;
  }
};

}  // namespace

MethodEntry method_entry() {
  return federated::method_entry_of<HetLora>("rounds of LoRA with clients of different, shrinking ranks");
}

}  // namespace moraine::algorithms::hetlora
