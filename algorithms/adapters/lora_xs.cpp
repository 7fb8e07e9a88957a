#include "algorithms/adapters/lora_xs.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_svd.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros.h>
#include <c10/core/ScalarType.h>

namespace moraine::algorithms::adapters {
namespace {

constexpr double kStartDeviation = 1e-5;

class LoraXsSlot final : public SlotAdapter {
 public:
  struct Frozen {
    at::Tensor a, b;
    double scale = 1, dropout = 0;
    std::string path = {};
  };
  LoraXsSlot(at::Tensor r, Frozen frozen) : r_(std::move(r)), frozen_(std::move(frozen)) {}

  at::Tensor forward(const at::Tensor& x, const models::SlotBase& base, const models::Pass& pass) override {
    const at::Tensor y = base.forward(x);
    const at::ScalarType type = c10::promoteTypes(at::kFloat, x.scalar_type());
    const at::Tensor in = dropped(x.to(type), frozen_.dropout, pass, frozen_.path);
    const at::Tensor inner = at::linear(at::linear(in, frozen_.a.to(type)), r_.to(type));
    return y.add(at::linear(inner, frozen_.b.to(type)), frozen_.scale).to(y.scalar_type());
  }
  models::NamedTensors parameters() const override { return {{"lora_R", r_}}; }
  models::NamedTensors state() const override { return {{"lora_A", frozen_.a}, {"lora_B", frozen_.b}}; }
  std::optional<at::Tensor> delta(const models::SlotBase& base) const override {
    const Factored factors = *factored(base);
    return at::matmul(factors.parts[0].first, factors.parts[0].second).mul(factors.scale);
  }
  std::optional<Factored> factored(const models::SlotBase&) const override {
    const at::NoGradGuard no_grad;
    return Factored{{{at::matmul(frozen_.b, r_), frozen_.a}}, frozen_.scale};
  }

 private:
  at::Tensor r_;
  Frozen frozen_;
};

class LoraXs final : public Parametrisation {
 public:
  std::string name() const override { return "lora_xs"; }
  std::string summary() const override {
    return "a small trained matrix between frozen singular vectors of the weight (LoRA-XS, arXiv 2405.17604)";
  }
  Traits traits() const override { return {.zero_at_init = false, .reads_base = true}; }
  std::optional<std::string> problem(const AdapterConfig& config) const override {
    if (config.init != AdapterConfig().init) return "lora_xs starts from the weight's singular vectors: leave init out";
    return std::nullopt;
  }
  Counts count(std::span<const Target> targets, const AdapterConfig&) const override {
    int64_t trained = 0;
    for (const Target& target : targets) trained += target.rank * target.rank;
    return {trained, trained + lora_parameters(targets)};
  }
  std::shared_ptr<SlotAdapter> make(const SlotInit& init) const override {
    const at::NoGradGuard no_grad;
    const int64_t rank = init.target.rank;
    LoraXsSlot::Frozen frozen{at::zeros({rank, init.target.slot.in}, at::kFloat),
                              at::zeros({init.target.slot.out, rank}, at::kFloat), init.target.scale,
                              init.config.dropout, init.target.slot.path};
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
    return std::make_shared<LoraXsSlot>(leaf(r, init.device), std::move(frozen));
  }
};

}  // namespace

const Parametrisation& lora_xs() {
  static const LoraXs instance;
  return instance;
}

}  // namespace moraine::algorithms::adapters
