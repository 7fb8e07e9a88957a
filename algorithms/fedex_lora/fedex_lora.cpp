#include "algorithms/fedex_lora/fedex_lora.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>

#include "algorithms/federated/federated.h"

namespace moraine::algorithms::fedex_lora {
namespace {

class FedExLora final : public federated::Federation {
 public:
  static constexpr const char* kName = "fedex_lora";
  bool changes_base() const override { return true; }
  bool server_optimizers() const override { return false; }

  federated::GlobalState aggregate(const federated::Round& round) const override {
    federated::GlobalState next = Federation::aggregate(round);
    for (const std::string& slot : round.slots()) {
      const at::Tensor& mean_a = next.factors.at(slot + ".lora_A.weight");
      const at::Tensor& mean_b = next.factors.at(slot + ".lora_B.weight");
      std::vector<at::Tensor> a, b;
      for (const auto& contribution : round.contributions) {
        a.push_back((contribution.factor(slot + ".lora_A.weight") - mean_a) * (contribution.weight * round.scale));
        b.push_back(contribution.factor(slot + ".lora_B.weight") - mean_b);
      }
      next.base_change[slot + ".base_A"] = at::cat(a, 0);
      next.base_change[slot + ".base_B"] = at::cat(b, 1);
    }
    return next;
  }

  Traffic traffic(int64_t in, int64_t out, int64_t rank, int64_t sum_of_ranks, int64_t) const override {
    return {rank * (in + out), (rank + sum_of_ranks) * (in + out)};
  }
};

}  // namespace

MethodEntry method_entry() {
  return federated::method_entry_of<FedExLora>(
      "rounds of LoRA, A and B averaged apart and the exact residual added to the base");
}

}  // namespace moraine::algorithms::fedex_lora
