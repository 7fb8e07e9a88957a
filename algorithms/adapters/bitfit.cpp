#include "algorithms/adapters/bitfit.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/zeros.h>
#include <c10/core/ScalarType.h>

namespace moraine::algorithms::adapters {
namespace {

class BitfitSlot final : public SlotAdapter {
 public:
  explicit BitfitSlot(at::Tensor change) : change_(std::move(change)) {}

  at::Tensor forward(const at::Tensor& x, const models::SlotBase& base, const models::Pass&) override {
    const at::Tensor y = base.forward(x);
    return (y.to(c10::promoteTypes(change_.scalar_type(), y.scalar_type())) + change_).to(y.scalar_type());
  }
  models::NamedTensors parameters() const override { return {{"bias_change", change_}}; }
  std::optional<at::Tensor> delta(const models::SlotBase& base) const override {
    return at::zeros({}, base.weight.options().dtype(at::kFloat)).expand_as(base.weight);
  }
  at::Tensor bias_delta(const models::SlotBase&) const override { return change_.detach(); }

 private:
  at::Tensor change_;
};

class Bitfit final : public Parametrisation {
 public:
  std::string name() const override { return "bitfit"; }
  std::string summary() const override { return "trained biases (BitFit, arXiv 2106.10199)"; }
  Traits traits() const override { return {.uses_rank = false, .averages_exactly = true, .change = Change::kBias}; }
  std::optional<std::string> problem(const AdapterConfig& config) const override {
    if (config.dropout != 0) return "bitfit has no inputs that dropout could zero: leave dropout out";
    return std::nullopt;
  }
  Counts count(std::span<const Target> targets, const AdapterConfig&) const override {
    int64_t all = 0;
    for (const Target& target : targets) all += target.slot.out;
    return {all, all};
  }
  std::shared_ptr<SlotAdapter> make(const SlotInit& init) const override {
    return std::make_shared<BitfitSlot>(leaf(at::zeros({init.target.slot.out}, at::kFloat), init.device));
  }
};

}  // namespace

const Parametrisation& bitfit() {
  static const Bitfit instance;
  return instance;
}

}  // namespace moraine::algorithms::adapters
