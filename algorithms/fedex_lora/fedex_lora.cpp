#include "algorithms/fedex_lora/fedex_lora.h"

#include <optional>

#include <ATen/TensorOperators.h>

#include "algorithms/adapters/parametrisation.h"
#include "algorithms/federated/federated.h"

namespace moraine::algorithms::fedex_lora {
namespace {

class FedExLora final : public federated::Federation {
 public:
  static constexpr const char* kName = "fedex_lora";
  bool changes_base() const override { return true; }
  bool server_optimizers() const override { return false; }

  std::optional<federated::Refusal> refusal(const adapters::AdapterConfig& adapter) const override {
    if (auto refusal = federated::unless_factors(adapter, "fedex_lora adds what averaging loses as factors"))
      return refusal;
    if (adapters::parametrisation(adapter.type).traits().averages_exactly)
      return federated::Refusal{fmt::format("averaging loses nothing of type {}", adapter.type), "method: fedit"};
    return std::nullopt;
  }

  federated::GlobalState aggregate(const federated::Round& round) const override {
    federated::GlobalState next = Federation::aggregate(round);
    const federated::Changes mean = round.change_with(next.adapter);
    federated::Stack residual;
    for (const auto& contribution : round.contributions)
      for (const auto& [slot, change] : round.change_of(contribution))
        // Factors that training does not move are their own mean.
        for (size_t i = 0; i + change.frozen < change.parts.size(); ++i) {
          const auto& [mean_b, mean_a] = mean.at(slot).parts[i];
          const auto& [b, a] = change.parts[i];
          residual.add(slot, b - mean_b, (a - mean_a) * (contribution.weight * change.scale));
        }
    next.base_change = residual.base_change();
    return next;
  }

  int64_t numbers_added(const federated::Changes& change) const override {
    return federated::numbers_in(change, /*with_frozen=*/false);
  }
};

}  // namespace

MethodEntry method_entry() {
  return federated::method_entry_of<FedExLora>(
      "rounds of LoRA, A and B averaged apart and the exact residual added to the base");
}

}  // namespace moraine::algorithms::fedex_lora
