#include "algorithms/flora/flora.h"

#include <optional>

#include <ATen/TensorOperators.h>

#include "algorithms/adapters/parametrisation.h"
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

  std::optional<federated::Refusal> refusal(const adapters::AdapterConfig& adapter) const override {
    return federated::unless_factors(adapter, "flora stacks factors");
  }

  federated::GlobalState aggregate(const federated::Round& round) const override {
    federated::Stack stack;
    for (const auto& contribution : round.contributions)
      for (const auto& [slot, change] : round.change_of(contribution))
        for (const auto& [b, a] : change.parts) stack.add(slot, b, a * (contribution.weight * change.scale));
    federated::GlobalState next;
    next.base_change = stack.base_change();
    return next;
  }

  int64_t numbers_added(const federated::Changes& change) const override {
    return federated::numbers_in(change, /*with_frozen=*/true);
  }
};

}  // namespace

MethodEntry method_entry() {
  return federated::method_entry_of<Flora>("rounds of LoRA, factors of any rank stacked exactly and added to the base");
}

}  // namespace moraine::algorithms::flora
