#include "algorithms/adapters/lora.h"

#include <cmath>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/linalg_qr.h>
#include <ATen/ops/linalg_svd.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros.h>
#include <c10/core/ScalarType.h>

#include "core/error.h"

namespace moraine::algorithms::adapters {
namespace {

// Of the leading singular triplets or columns of the weight, so that s B A is its best approximation of that rank
// (PiSSA, arXiv 2404.02948, equation 3) or the leading part of its QR (OLoRA, arXiv 2406.01775).
LoraFactors from_weight(const SlotInit& init) {
  const int64_t r = init.target.rank;
  const at::Tensor weight = init.base->weight.detach().to(at::kCPU, at::kFloat);
  if (init.config.init == "olora") {
    const auto [q, rest] = at::linalg_qr(weight, "reduced");
    return {rest.narrow(0, 0, r).contiguous(), q.narrow(1, 0, r).contiguous(), true};
  }
  const auto [u, s, vh] = at::linalg_svd(weight, /*full_matrices=*/false);
  const at::Tensor root = (s.narrow(0, 0, r) / init.target.scale).sqrt();
  return {(root.unsqueeze(1) * vh.narrow(0, 0, r)).contiguous(), (u.narrow(1, 0, r) * root).contiguous(), true};
}

// Leading eigenvectors of the inputs' second moments; eigh orders them from the smallest.
LoraFactors from_inputs(const SlotInit& init) {
  const models::Slot& slot = init.target.slot;
  const int64_t r = init.target.rank;
  MORAINE_CHECK(init.input_moments.defined(), "init eva needs the inputs of {}", slot.path);
  const auto [values, vectors] = at::linalg_eigh(init.input_moments.to(at::kCPU, at::kDouble));
  const double largest = values[-1].item<double>(), last = values[-r].item<double>();
  // Below that an eigenvalue of float32 inputs is rounding.
  if (!(last > largest * 1e-13))
    throw core::UserError(
        fmt::format("algorithms/adapters: the examples' inputs of {} span fewer than {} directions", slot.path, r),
        "raise options.examples, or lower the rank");
  return {vectors.narrow(1, slot.in - r, r).flip(1).t().to(at::kFloat).contiguous(),
          at::zeros({slot.out, r}, at::kFloat), false};
}

class Lora final : public Parametrisation {
 public:
  std::string name() const override { return "lora"; }
  std::string summary() const override {
    return "low-rank update s B A (LoRA, arXiv 2106.09685; rsLoRA, PiSSA, OLoRA and EVA by use_rslora and init)";
  }
  core::Json options() const override { return eva_options(); }
  Wants wants(const AdapterConfig& config) const override { return eva_wants(config); }
  std::optional<std::string> problem(const AdapterConfig& config) const override { return eva_problem(config); }
  TensorTraits tensor_traits(std::string_view name) const override { return pair_traits(name); }
  Counts count(std::span<const Target> targets, const AdapterConfig& config) const override {
    const int64_t factors = lora_parameters(targets);
    return {factors, starts_from_base(config) ? 2 * factors : factors};
  }
  std::shared_ptr<SlotAdapter> make(const SlotInit& init) const override {
    const at::NoGradGuard no_grad;
    const LoraFactors start = first_factors(init);
    at::Tensor a0, b0;
    if (start.from_base) a0 = start.a.to(init.device).clone(), b0 = start.b.to(init.device).clone();
    return std::make_shared<LoraSlot>(leaf(start.a, init.device), leaf(start.b, init.device),
                                      LoraSlot::Options{init.target.scale, init.config.dropout, init.target.slot.path},
                                      a0, b0);
  }
  std::string peft_type() const override { return "LORA"; }
  core::Json peft_config(const AdapterConfig& config) const override { return lora_peft_config(config); }
  AdapterConfig config_from_peft(const core::OrderedJson& json, const std::string& origin) const override {
    return lora_config_from_peft(json, origin);
  }
};

}  // namespace

core::Json eva_options() { return {{"examples", 64}}; }

Wants eva_wants(const AdapterConfig& config) { return config.init == "eva" ? Wants::kInputMoments : Wants::kNothing; }

std::optional<std::string> eva_problem(const AdapterConfig& config) {
  if (option_of(config, "examples").get<int64_t>() < 1) return "options.examples: must be at least 1";
  if (config.init != "eva" && config.options.contains("examples"))
    return fmt::format("options.examples is for init: eva, this one is {}", config.init);
  return std::nullopt;
}

TensorTraits pair_traits(std::string_view name) {
  if (name == "lora_A.weight") return {.averages_exactly = false, .ranks_at = 0};
  if (name == "lora_B.weight") return {.averages_exactly = true, .ranks_at = 1};
  return {};
}

LoraFactors first_factors(const SlotInit& init) {
  const at::NoGradGuard no_grad;
  const models::Slot& slot = init.target.slot;
  const int64_t r = init.target.rank;
  const std::string& how = init.config.init;
  if (starts_from_base(init.config)) {
    if (init.fresh) return from_weight(init);
    return {at::zeros({r, slot.in}, at::kFloat), at::zeros({slot.out, r}, at::kFloat), true};
  }
  if (how == "eva" && init.fresh) return from_inputs(init);
  const at::Generator generator = generator_for(init, ".lora_A.weight");
  at::Tensor a = at::empty({r, slot.in}, at::kFloat);
  if (how == "gaussian") {
    a.normal_(0, 1.0 / static_cast<double>(r), generator);
  } else {
    const double bound = 1.0 / std::sqrt(static_cast<double>(slot.in));  // kaiming_uniform with a = sqrt(5)
    a.uniform_(-bound, bound, generator);
  }
  return {a, at::zeros({slot.out, r}, at::kFloat), false};
}

LoraSlot::LoraSlot(at::Tensor a, at::Tensor b, Options options, at::Tensor a0, at::Tensor b0)
    : a_(std::move(a)), b_(std::move(b)), a0_(std::move(a0)), b0_(std::move(b0)), options_(std::move(options)) {}

/// What is stored narrower than float32 is computed with in float32, as in PEFT.
at::ScalarType LoraSlot::compute_type() const {
  return c10::promoteTypes(at::kFloat, c10::promoteTypes(a_.scalar_type(), b_.scalar_type()));
}

at::Tensor LoraSlot::update(const at::Tensor& x, const models::Pass& pass) const {
  const at::ScalarType type = c10::promoteTypes(compute_type(), x.scalar_type());
  const at::Tensor in = dropped(x.to(type), options_.dropout, pass, options_.path);
  at::Tensor out = at::linear(at::linear(in, a_.to(type)), b_.to(type));
  if (a0_.defined()) out = out - at::linear(at::linear(in, a0_.to(type)), b0_.to(type));
  return out;
}

at::Tensor LoraSlot::forward(const at::Tensor& x, const models::SlotBase& base, const models::Pass& pass) {
  const at::Tensor y = base.forward(x);
  return y.add(update(x, pass), options_.scale).to(y.scalar_type());
}

models::NamedTensors LoraSlot::parameters() const { return {{"lora_A.weight", a_}, {"lora_B.weight", b_}}; }

models::NamedTensors LoraSlot::state() const {
  if (!a0_.defined()) return {};
  return {{"lora_A0", a0_}, {"lora_B0", b0_}};
}

std::optional<Factored> LoraSlot::factored(const models::SlotBase&) const {
  Factored parts{{{b_.detach(), a_.detach()}}, options_.scale};
  if (a0_.defined()) {
    parts.parts.emplace_back(b0_.neg(), a0_);
    parts.frozen = 1;
  }
  return parts;
}

std::optional<at::Tensor> LoraSlot::delta(const models::SlotBase&) const {
  const at::NoGradGuard no_grad;
  const at::ScalarType type = compute_type();
  at::Tensor change = at::matmul(b_.to(type), a_.to(type));
  if (a0_.defined()) change = change - at::matmul(b0_.to(type), a0_.to(type));
  return change.mul(options_.scale);
}

/// Of an adapter that started from the base the plain LoRA of twice the rank: [A; A0], [B, -B0], at the same scale.
models::NamedTensors LoraSlot::peft_tensors() const {
  const at::NoGradGuard no_grad;
  if (!a0_.defined()) return parameters();
  return {{"lora_A.weight", at::cat({a_, a0_}, 0)}, {"lora_B.weight", at::cat({b_, b0_.neg()}, 1)}};
}

const Parametrisation& lora() {
  static const Lora instance;
  return instance;
}

}  // namespace moraine::algorithms::adapters
