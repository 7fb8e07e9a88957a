#include "algorithms/ffa_lora/ffa_lora.h"

#include "algorithms/adapters/parametrisation.h"
#include "algorithms/federated/federated.h"

namespace moraine::algorithms::ffa_lora {
namespace {

class FfaLora final : public federated::Federation {
 public:
  static constexpr const char* kName = "ffa_lora";
  bool trains_exact_only() const override { return true; }
  std::optional<federated::Refusal> refusal(const adapters::AdapterConfig& adapter) const override {
    if (adapters::parametrisation(adapter.type).traits().averages_exactly)
      return federated::Refusal{fmt::format("all that type {} trains averages exactly as it is", adapter.type),
                                "method: fedit"};
    return federated::unless_factors(adapter, "ffa_lora holds one of two factors");
  }
};

}  // namespace

MethodEntry method_entry() {
  return federated::method_entry_of<FfaLora>("rounds of LoRA with one frozen random A; only B travels");
}

}  // namespace moraine::algorithms::ffa_lora
