#include "algorithms/flora/flora.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>

#include "algorithms/federated/federated.h"

namespace moraine::algorithms::flora {
namespace {

class Flora final : public federated::Federation {
 public:
  static constexpr const char* kName = "flora";
  bool starts_fresh() const override { return true; }
  bool changes_base() const override { return true; }
  bool mixed_ranks() const override { return true; }
  bool server_optimizers() const override { return false; }

  federated::GlobalState aggregate(const federated::Round& round) const override {
    federated::GlobalState next;
    for (const std::string& slot : round.slots()) {
      std::vector<at::Tensor> a, b;
      for (const auto& contribution : round.contributions) {
        a.push_back(contribution.factor(slot + ".lora_A.weight") * (contribution.weight * round.scale));
        b.push_back(contribution.factor(slot + ".lora_B.weight"));
      }
      next.base_change[slot + ".base_A"] = at::cat(a, 0);
      next.base_change[slot + ".base_B"] = at::cat(b, 1);
    }
    return next;
  }

  Traffic traffic(int64_t in, int64_t out, int64_t rank, int64_t sum_of_ranks, int64_t) const override {
    return {rank * (in + out), sum_of_ranks * (in + out)};
  }
};

}  // namespace

MethodEntry method_entry() {
  return federated::method_entry_of<Flora>("rounds of LoRA, factors of any rank stacked exactly and added to the base");
}

}  // namespace moraine::algorithms::flora
