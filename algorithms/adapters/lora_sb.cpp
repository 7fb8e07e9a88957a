#include "algorithms/adapters/lora_sb.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/diag.h>
#include <ATen/ops/linalg_svd.h>
#include <ATen/ops/sign.h>
#include <ATen/ops/zeros.h>

#include "algorithms/adapters/frozen_factors.h"
#include "algorithms/adapters/lora.h"
#include "core/error.h"

namespace moraine::algorithms::adapters {
namespace {

class LoraSb final : public Parametrisation {
 public:
  std::string name() const override { return "lora_sb"; }
  std::string summary() const override {
    return "a small trained matrix between singular vectors of the first step of full fine-tuning "
           "(LoRA-SB, arXiv 2411.19557)";
  }
  Traits traits() const override { return {.zero_at_init = false, .averages_exactly = true}; }
  Wants wants(const AdapterConfig&) const override { return Wants::kGradients; }
  core::Json options() const override { return {{"examples", 64}}; }
  std::optional<std::string> problem(const AdapterConfig& config) const override {
    const AdapterConfig plain;
    if (option_of(config, "examples").get<int64_t>() < 1) return "options.examples: must be at least 1";
    if (config.init != plain.init) return "lora_sb starts from gradients of examples: leave init out";
    if ((config.alpha != plain.alpha && config.alpha != static_cast<double>(config.rank)) || config.use_rslora ||
        !config.alpha_pattern.empty())
      return "lora_sb has scale 1: leave alpha, alpha_pattern and use_rslora out";
    return std::nullopt;
  }
  Counts count(std::span<const Target> targets, const AdapterConfig&) const override {
    return frozen_factors_count(targets);
  }
  std::string peft_type() const override { return "LORA"; }
  core::Json peft_config(const AdapterConfig& config) const override {
    AdapterConfig lora = config;  // of scale 1, so alpha is the rank everywhere
    lora.alpha = static_cast<double>(config.rank);
    for (const auto& [module, rank] : config.rank_pattern)
      lora.alpha_pattern.push_back({module, static_cast<double>(rank)});
    return lora_peft_config(lora);
  }
  std::shared_ptr<SlotAdapter> make(const SlotInit& init) const override {
    const at::NoGradGuard no_grad;
    const int64_t rank = init.target.rank;
    FrozenFactors frozen = frozen_factors(init, /*scale=*/1);
    at::Tensor r = at::zeros({rank, rank}, at::kFloat);
    if (init.fresh) {
      MORAINE_CHECK(init.gradient.defined(), "lora_sb needs a gradient for {}", init.target.slot.path);
      const at::Tensor step = at::sign(init.gradient.to(at::kCPU, at::kFloat)).mul(-init.first_learning_rate);
      const auto [u, s, vh] = at::linalg_svd(step, /*full_matrices=*/false);
      frozen.a = vh.narrow(0, 0, rank).contiguous();
      frozen.b = u.narrow(1, 0, rank).contiguous();
      r = at::diag(s.narrow(0, 0, rank));
    }
    frozen.a = frozen.a.to(init.device);
    frozen.b = frozen.b.to(init.device);
    return std::make_shared<FrozenFactorsSlot>(leaf(r, init.device), std::move(frozen));
  }
};

}  // namespace

const Parametrisation& lora_sb() {
  static const LoraSb instance;
  return instance;
}

}  // namespace moraine::algorithms::adapters
