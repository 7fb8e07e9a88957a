#include "algorithms/hetlora/hetlora.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/zeros.h>

#include "algorithms/adapters/adapter.h"
#include "algorithms/federated/federated.h"
#include "core/error.h"
#include "models/tensor_io.h"

namespace moraine::algorithms::hetlora {
namespace {

using adapters::TrainedTensors;
using federated::PruningConfig;
using federated::Tensors;

int64_t tail_start(int64_t rank, const PruningConfig& config) {
  return std::max(config.min_rank, static_cast<int64_t>(std::floor(config.gamma * static_cast<double>(rank))));
}

// sum over slots of ||B[:, q:]||_F ||A[q:, :]||_F; undefined when there is no tail.
at::Tensor tail_product(const Tensors& tensors, const TrainedTensors& trained, const PruningConfig& config) {
  std::map<std::string, at::Tensor> products;  // by slot
  for (const auto& [name, tensor] : trained) {
    const int64_t side = tensor.traits.ranks_at.value();
    const at::Tensor& factor = tensors.at(name);
    const int64_t rank = factor.size(side), q = tail_start(rank, config);
    if (q >= rank) return {};
    // The norm's gradient at zero (B starts there) is NaN in ATen only for the plain square root; vector_norm gives 0.
    const at::Tensor norm = at::linalg_vector_norm(factor.narrow(side, q, rank - q));
    at::Tensor& product = products[tensor.slot];
    product = product.defined() ? product * norm : norm;
  }
  at::Tensor sum;
  for (const auto& [slot, product] : products) sum = sum.defined() ? sum + product : product;
  return sum;
}

// ||B A||_F over all slots without forming B A: the sum of A o ((B^T B) A). The scale is the same for all clients.
double norm_of(const federated::Changes& changes) {
  double squares = 0;
  for (const auto& [slot, change] : changes) {
    MORAINE_CHECK_EQ(change.parts.size(), size_t{1});
    const at::Tensor b = change.parts[0].first.to(at::kDouble), a = change.parts[0].second.to(at::kDouble);
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

  std::optional<federated::Refusal> refusal(const adapters::AdapterConfig& adapter) const override {
    if (adapters::ranks_stand_alone(adapter)) return std::nullopt;
    if (adapters::can_be_truncated(adapter))
      return federated::Refusal{"hetlora cuts and pads ranks, and as_trained weighs them by the rank they are among",
                                "leave options.as_trained out"};
    return federated::Refusal{
        fmt::format("hetlora cuts and pads ranks, and an adapter of type {}{} has no first ranks to cut it to",
                    adapter.type, adapters::starts_from_base(adapter) ? " that starts from the base" : ""),
        "type: lora with init: kaiming or gaussian, dylora or matryoshka"};
  }

  at::Tensor penalty(const Tensors& tensors, const TrainedTensors& trained,
                     const PruningConfig& config) const override {
    if (config.lambda == 0) return {};
    const at::Tensor tail = tail_product(tensors, trained, config);
    return tail.defined() ? tail * config.lambda : tail;
  }

  int64_t rank_after(const Tensors& before, const Tensors& after, const TrainedTensors& trained, int64_t rank,
                     const PruningConfig& config) const override {
    const at::NoGradGuard no_grad;
    const at::Tensor was = tail_product(before, trained, config), is = tail_product(after, trained, config);
    return is.defined() && is.item<double>() < was.item<double>() ? tail_start(rank, config) : rank;
  }

  federated::GlobalState aggregate(const federated::Round& round) const override {
    std::vector<double> weights;
    for (const auto& contribution : round.contributions) weights.push_back(norm_of(round.change_of(contribution)));
    const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
    for (double& weight : weights) weight = total > 0 ? weight / total : 1.0 / static_cast<double>(weights.size());
    federated::GlobalState next;
    next.weights = weights;
    for (const auto& [name, x] : round.global) {
      const int64_t side = round.trained.at(name).traits.ranks_at.value();
      at::Tensor sum = at::zeros(x.sizes(), at::kDouble);
      for (size_t k = 0; k < weights.size(); ++k) {
        const auto& artefact = round.contributions[k].artefact;
        const at::Tensor factor = models::borrow(*artefact->file().find(name), artefact);
        sum.narrow(side, 0, factor.size(side)).add_(factor.to(at::kDouble), weights[k]);
      }
      next.adapter[name] =
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
