#include "algorithms/ffa_lora/ffa_lora.h"

#include "algorithms/federated/federated.h"

namespace moraine::algorithms::ffa_lora {
namespace {

class FfaLora final : public federated::Federation {
 public:
  static constexpr const char* kName = "ffa_lora";
  bool trains(std::string_view factor) const override { return factor == "lora_B.weight"; }
};

}  // namespace

MethodEntry method_entry() {
  return federated::method_entry_of<FfaLora>("rounds of LoRA with one frozen random A; only B travels");
}

}  // namespace moraine::algorithms::ffa_lora
