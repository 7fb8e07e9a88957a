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
    const adapters::Traits traits = adapters::parametrisation(adapter.type).traits();
    if (traits.averages_exactly)
      return federated::Refusal{fmt::format("all that type {} trains averages exactly as it is", adapter.type),
                                "method: fedit"};
    if (traits.change != adapters::Change::kFactors)
      return federated::Refusal{
          fmt::format("ffa_lora holds one of two factors, and the change of type {} is no product of factors",
                      adapter.type),
          "method: fedit averages tensors of any type"};
    return std::nullopt;
  }
};

}  // namespace

MethodEntry method_entry() {
  return federated::method_entry_of<FfaLora>("rounds of LoRA with one frozen random A; only B travels");
}

}  // namespace moraine::algorithms::ffa_lora
