#include "algorithms/flexlora/flexlora.h"

#include <algorithm>
#include <optional>
#include <string>

#include <ATen/TensorOperators.h>
#include <ATen/ops/zeros_like.h>

#include "algorithms/adapters/adapter.h"
#include "algorithms/federated/federated.h"
#include "algorithms/mergers/low_rank.h"
#include "core/error.h"

namespace moraine::algorithms::flexlora {
namespace {

class FlexLora final : public federated::Federation {
 public:
  static constexpr const char* kName = "flexlora";
  bool mixed_ranks() const override { return true; }
  bool server_optimizers() const override { return false; }

  std::optional<federated::Refusal> refusal(const adapters::AdapterConfig& adapter) const override {
    if (adapters::can_be_truncated(adapter) && !adapters::parametrisation(adapter.type).traits().nested_ranks)
      return std::nullopt;
    return federated::Refusal{
        fmt::format(
            "flexlora replaces both factors by singular directions, and an adapter of type {}{} is no free pair "
            "of factors of one rank",
            adapter.type, adapters::starts_from_base(adapter) ? " that starts from the base" : ""),
        "type: lora with init: kaiming or gaussian"};
  }

  federated::GlobalState aggregate(const federated::Round& round) const override {
    federated::Stack stack;
    for (const auto& contribution : round.contributions)
      for (const auto& [slot, change] : round.change_of(contribution)) {
        MORAINE_CHECK_EQ(change.parts.size(), size_t{1});
        const auto& [b, a] = change.parts[0];
        stack.add(slot, b.to(at::kDouble) * contribution.weight, a.to(at::kDouble));
      }
    auto pairs = stack.pairs();
    for (auto& [slot, pair] : pairs) {
      const auto parts = mergers::svd_of_product(pair.first, pair.second);
      pair = {parts.u * parts.s, parts.vt};
    }
    federated::GlobalState next;
    for (const auto& [name, x] : round.global) {
      const auto& [slot, traits] = round.trained.at(name);
      const int64_t side = traits.ranks_at.value(), rank = x.size(side);
      const at::Tensor& directions = side == 0 ? pairs.at(slot).second : pairs.at(slot).first;
      const int64_t known = std::min(rank, directions.size(side));
      at::Tensor value = side == 0 ? x.clone() : at::zeros_like(x);
      value.narrow(side, 0, known).copy_(directions.narrow(side, 0, known));
      next.adapter[name] = value;
    }
    return next;
  }
};

}  // namespace

MethodEntry method_entry() {
  return federated::method_entry_of<FlexLora>(
      "rounds of LoRA, changes averaged exactly and sent as singular directions of each client's rank");
}

}  // namespace moraine::algorithms::flexlora
