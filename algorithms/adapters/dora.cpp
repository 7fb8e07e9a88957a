#include "algorithms/adapters/dora.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros.h>

#include "algorithms/adapters/lora.h"

namespace moraine::algorithms::adapters {
namespace {

at::Tensor norms_of_rows(const at::Tensor& matrix) { return at::linalg_vector_norm(matrix, 2, at::IntArrayRef({1})); }

class DoraSlot final : public LoraSlot {
 public:
  DoraSlot(at::Tensor a, at::Tensor b, at::Tensor magnitude, Options options)
      : LoraSlot(std::move(a), std::move(b), std::move(options)), magnitude_(std::move(magnitude)) {}

  at::Tensor forward(const at::Tensor& x, const models::SlotBase& base, const models::Pass& pass) override {
    const at::Tensor y = base.forward(x);
    const at::Tensor gain = magnitude_ / row_norms(base);
    // With dropout the base's part of the change is of the dropped input too.
    at::Tensor without_bias = y;
    if (pass.training && options_.dropout > 0)
      without_bias = models::apply_linear(dropped(x, options_.dropout, pass, options_.path), base.weight);
    else if (base.bias.defined())
      without_bias = y - models::as_type_of(base.bias, y);
    const at::Tensor change = update(x, pass);
    return (y + (gain - 1) * without_bias + gain * change * options_.scale).to(y.scalar_type());
  }
  models::NamedTensors parameters() const override {
    return {{"lora_A.weight", a_}, {"lora_B.weight", b_}, {"lora_magnitude_vector", magnitude_}};
  }
  std::optional<at::Tensor> delta(const models::SlotBase& base) const override {
    const at::NoGradGuard no_grad;
    const at::Tensor gain = (magnitude_ / row_norms(base)).unsqueeze(1);
    const at::Tensor weight = base.weight.to(compute_type());
    return gain * (weight + *LoraSlot::delta(base)) - weight;
  }
  std::optional<Factored> factored(const models::SlotBase&) const override { return std::nullopt; }
  models::NamedTensors peft_tensors() const override { return parameters(); }

 private:
  at::Tensor row_norms(const models::SlotBase& base) const {
    const at::NoGradGuard no_grad;
    return norms_of_rows(base.weight.to(compute_type()) + *LoraSlot::delta(base));
  }

  at::Tensor magnitude_;
};

class Dora final : public Parametrisation {
 public:
  std::string name() const override { return "dora"; }
  std::string summary() const override {
    return "LoRA with trained norms of the weight's rows (DoRA, arXiv 2402.09353)";
  }
  Traits traits() const override { return {.reads_base = true, .change = Change::kDense}; }
  /// Norms of the rows of W + s B A divide the change, so it is affine in neither factor, only in the magnitudes.
  TensorTraits tensor_traits(std::string_view name) const override {
    return {.averages_exactly = name == "lora_magnitude_vector"};
  }
  core::Json options() const override { return eva_options(); }
  Wants wants(const AdapterConfig& config) const override { return eva_wants(config); }
  std::optional<std::string> problem(const AdapterConfig& config) const override {
    if (starts_from_base(config)) return "dora starts from A of its own: init kaiming, gaussian or eva";
    return eva_problem(config);
  }
  Counts count(std::span<const Target> targets, const AdapterConfig&) const override {
    int64_t all = lora_parameters(targets);
    for (const Target& target : targets) all += target.slot.out;
    return {all, all};
  }
  std::shared_ptr<SlotAdapter> make(const SlotInit& init) const override {
    const at::NoGradGuard no_grad;
    const LoraFactors start = first_factors(init);
    const at::Tensor norms = init.fresh ? norms_of_rows(init.base->weight.detach().to(at::kFloat))
                                        : at::zeros({init.target.slot.out}, at::kFloat);
    return std::make_shared<DoraSlot>(leaf(start.a, init.device), leaf(start.b, init.device), leaf(norms, init.device),
                                      LoraSlot::Options{init.target.scale, init.config.dropout, init.target.slot.path});
  }
  std::string peft_type() const override { return "LORA"; }
  core::Json peft_config(const AdapterConfig& config) const override { return lora_peft_config(config); }
  AdapterConfig config_from_peft(const core::OrderedJson& json, const std::string& origin) const override {
    return lora_config_from_peft(json, origin);
  }
};

}  // namespace

const Parametrisation& dora() {
  static const Dora instance;
  return instance;
}

}  // namespace moraine::algorithms::adapters
