#include "algorithms/adapters/adaptertune.h"

#include <algorithm>
#include <cmath>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/zeros.h>

#include "core/error.h"

namespace moraine::algorithms::adapters {
namespace {

class AdapterTuneSlot final : public SlotAdapter {
 public:
  AdapterTuneSlot(at::Tensor down, at::Tensor down_bias, at::Tensor up, at::Tensor up_bias, double scale)
      : down_(std::move(down)),
        down_bias_(std::move(down_bias)),
        up_(std::move(up)),
        up_bias_(std::move(up_bias)),
        scale_(scale) {}

  at::Tensor forward(const at::Tensor& x, const models::SlotBase& base, const models::Pass&) override {
    const at::Tensor h = base.forward(x);
    const at::Tensor inner = at::gelu(models::apply_linear(h, down_, down_bias_));
    return h + models::apply_linear(inner, up_, up_bias_) * scale_;
  }
  models::NamedTensors parameters() const override {
    return {{"down.bias", down_bias_}, {"down.weight", down_}, {"up.bias", up_bias_}, {"up.weight", up_}};
  }
  std::optional<at::Tensor> delta(const models::SlotBase&) const override { return std::nullopt; }

 private:
  at::Tensor down_, down_bias_, up_, up_bias_;
  double scale_;
};

/// A block between the adapted ones.
class Untouched final : public SlotAdapter {
 public:
  at::Tensor forward(const at::Tensor& x, const models::SlotBase& base, const models::Pass&) override {
    return base.forward(x);
  }
  models::NamedTensors parameters() const override { return {}; }
  std::optional<at::Tensor> delta(const models::SlotBase&) const override { return std::nullopt; }
};

bool is_adapted(int64_t block, const AdapterConfig& config) {
  return block % option_of(config, "every").get<int64_t>() == 0;
}

class AdapterTune final : public Parametrisation {
 public:
  std::string name() const override { return "adaptertune"; }
  std::string summary() const override {
    return "a GELU bottleneck behind every block, zero at the start (AdapterTune, arXiv 2603.14706)";
  }
  Traits traits() const override { return {.slots = models::SlotKind::kBlock, .change = Change::kNone}; }
  /// What is behind the GELU is affine in the way up.
  TensorTraits tensor_traits(std::string_view name) const override {
    return {.averages_exactly = name == "up.weight" || name == "up.bias"};
  }
  core::Json options() const override { return {{"scale", 1.0}, {"every", 1}, {"init", "zero"}}; }
  std::optional<std::string> problem(const AdapterConfig& config) const override {
    const auto every = option_of(config, "every").get<int64_t>();
    if (every < 1) return fmt::format("options.every: must be at least 1, found {}", every);
    const auto init = option_of(config, "init").get<std::string>();
    if (init != "zero" && init != "small") return fmt::format("options.init: zero or small, found '{}'", init);
    const AdapterConfig plain;
    if (config.alpha != plain.alpha || config.use_rslora || !config.alpha_pattern.empty())
      return "adaptertune is not scaled by its rank: leave alpha, alpha_pattern and use_rslora out (options.scale)";
    if (config.init != plain.init) return "adaptertune has starts of its own: options.init";
    if (config.dropout != 0) return "adaptertune has no dropout inside: leave dropout out";
    return std::nullopt;
  }
  Counts count(std::span<const Target> targets, const AdapterConfig& config) const override {
    int64_t all = 0;
    for (size_t block = 0; block < targets.size(); ++block) {
      const auto& [slot, rank, alpha, scale] = targets[block];
      if (is_adapted(static_cast<int64_t>(block), config)) all += 2 * slot.in * rank + rank + slot.in;
    }
    return {all, all};
  }
  std::shared_ptr<SlotAdapter> make(const SlotInit& init) const override {
    const auto block =
        std::ranges::find(init.targets, init.target.slot.path, [](const Target& target) { return target.slot.path; }) -
        init.targets.begin();
    if (!is_adapted(block, init.config)) return std::make_shared<Untouched>();
    const at::NoGradGuard no_grad;
    const int64_t d = init.target.slot.in, r = init.target.rank;
    at::Tensor down = at::empty({r, d}, at::kFloat), up = at::zeros({d, r}, at::kFloat), up_bias = at::zeros({d});
    if (init.fresh) {
      const double bound = std::sqrt(6.0 / static_cast<double>(d + r));
      down.uniform_(-bound, bound, generator_for(init, "/down"));
      if (init.option<std::string>("init") == "small") {
        up.normal_(0, 1e-4, generator_for(init, "/up"));
        up_bias.normal_(0, 1e-4, generator_for(init, "/up_bias"));
      }
    }
    return std::make_shared<AdapterTuneSlot>(leaf(down, init.device), leaf(at::zeros({r}), init.device),
                                             leaf(up, init.device), leaf(up_bias, init.device),
                                             init.option<double>("scale"));
  }
};

}  // namespace

const Parametrisation& adaptertune() {
  static const AdapterTune instance;
  return instance;
}

}  // namespace moraine::algorithms::adapters
