#include "algorithms/adapters/lora_xs.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_svd.h>

#include "algorithms/adapters/frozen_factors.h"

namespace moraine::algorithms::adapters {
namespace {

constexpr double kStartDeviation = 1e-5;

class LoraXs final : public Parametrisation {
 public:
  std::string name() const override { return "lora_xs"; }
  std::string summary() const override {
    return "a small trained matrix between frozen singular vectors of the weight (LoRA-XS, arXiv 2405.17604)";
  }
  Traits traits() const override { return {.zero_at_init = false, .reads_base = true, .averages_exactly = true}; }
  std::optional<std::string> problem(const AdapterConfig& config) const override {
    if (config.init != AdapterConfig().init) return "lora_xs starts from the weight's singular vectors: leave init out";
    return std::nullopt;
  }
  Counts count(std::span<const Target> targets, const AdapterConfig&) const override {
    return frozen_factors_count(targets);
  }
  std::shared_ptr<SlotAdapter> make(const SlotInit& init) const override {
    const at::NoGradGuard no_grad;
    const int64_t rank = init.target.rank;
    FrozenFactors frozen = frozen_factors(init, init.target.scale);
    if (init.fresh) {
      const auto [u, s, vh] =
          at::linalg_svd(init.base->weight.detach().to(at::kCPU, at::kFloat), /*full_matrices=*/false);
      frozen.a = (s.narrow(0, 0, rank).unsqueeze(1) * vh.narrow(0, 0, rank)).contiguous();
      frozen.b = u.narrow(1, 0, rank).contiguous();
    }
    frozen.a = frozen.a.to(init.device);
    frozen.b = frozen.b.to(init.device);
    const at::Tensor r =
        at::empty({rank, rank}, at::kFloat).normal_(0, kStartDeviation, generator_for(init, ".lora_R"));
    return std::make_shared<FrozenFactorsSlot>(leaf(r, init.device), std::move(frozen));
  }
};

}  // namespace

const Parametrisation& lora_xs() {
  static const LoraXs instance;
  return instance;
}

}  // namespace moraine::algorithms::adapters
