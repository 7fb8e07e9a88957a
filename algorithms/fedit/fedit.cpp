#include "algorithms/fedit/fedit.h"

#include "algorithms/federated/federated.h"

namespace moraine::algorithms::fedit {
namespace {

class FedIt final : public federated::Federation {
 public:
  static constexpr const char* kName = "fedit";
};

}  // namespace

MethodEntry method_entry() {
  return federated::method_entry_of<FedIt>(
      "rounds of adapters of any type, every tensor averaged by itself (FedAvg, FedProx, FedAvgM, FedAdagrad, FedAdam, "
      "FedYogi)");
}

}  // namespace moraine::algorithms::fedit
