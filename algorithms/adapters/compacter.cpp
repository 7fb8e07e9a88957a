#include "algorithms/adapters/compacter.h"

#include <cmath>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/einsum.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros.h>
#include <c10/core/ScalarType.h>

#include "core/error.h"
#include "core/hash.h"

namespace moraine::algorithms::adapters {
namespace {

/// x H of the Kronecker products, which are not built. x [..., n u], a [n, n, n], s [n, u], t [n, v] -> [tokens, n v].
at::Tensor product(const at::Tensor& x, const at::Tensor& a, const at::Tensor& s, const at::Tensor& t) {
  const at::ScalarType type = x.scalar_type();
  const int64_t n = a.size(0);
  const at::Tensor u = at::matmul(x.reshape({-1, n, s.size(1)}), s.to(type).t());  // [tokens, a, i]
  const at::Tensor v = at::einsum("xai,iab->xbi", {u, a.to(type)});
  return at::matmul(v, t.to(type)).view({-1, n * t.size(1)});
}

class CompacterSlot final : public SlotAdapter {
 public:
  struct Options {
    double dropout;
    std::string path;
  };
  CompacterSlot(at::Tensor a, at::Tensor s, at::Tensor t, Options options)
      : a_(std::move(a)), s_(std::move(s)), t_(std::move(t)), options_(std::move(options)) {}

  at::Tensor forward(const at::Tensor& x, const models::SlotBase& base, const models::Pass& pass) override {
    const at::Tensor y = base.forward(x);
    const at::ScalarType type = c10::promoteTypes(at::kFloat, x.scalar_type());
    const at::Tensor in = dropped(x.to(type), options_.dropout, pass, options_.path);
    return (y + product(in, a_, s_, t_).view(y.sizes())).to(y.scalar_type());
  }
  models::NamedTensors parameters() const override { return {{"phm_s", s_}, {"phm_t", t_}}; }
  std::optional<at::Tensor> delta(const models::SlotBase&) const override {
    const at::NoGradGuard no_grad;
    const at::ScalarType type = c10::promoteTypes(at::kFloat, s_.scalar_type());
    const int64_t n = a_.size(0);
    return at::einsum("iab,iu,iv->bvau", {a_.to(type), s_.to(type), t_.to(type)})
        .reshape({n * t_.size(1), n * s_.size(1)});
  }

 private:
  at::Tensor a_, s_, t_;
  Options options_;
};

/// Two of the layers with a non-linearity between, on the slot's output.
class CompacterAdapterSlot final : public SlotAdapter {
 public:
  /// One layer: s [n, in / n], t [n, out / n], bias [out].
  struct Layer {
    at::Tensor s, t, bias;
    at::Tensor operator()(const at::Tensor& x, const at::Tensor& a) const {
      return product(x, a, s, t) + bias.to(x.scalar_type());
    }
  };
  CompacterAdapterSlot(at::Tensor a, Layer down, Layer up, CompacterSlot::Options options)
      : a_(std::move(a)), down_(std::move(down)), up_(std::move(up)), options_(std::move(options)) {}

  at::Tensor forward(const at::Tensor& x, const models::SlotBase& base, const models::Pass& pass) override {
    const at::Tensor y = base.forward(x);
    const at::ScalarType type = c10::promoteTypes(at::kFloat, y.scalar_type());
    const at::Tensor in = dropped(y.to(type), options_.dropout, pass, options_.path);
    return (y + up_(at::gelu(down_(in, a_), "tanh"), a_).view(y.sizes())).to(y.scalar_type());
  }
  models::NamedTensors parameters() const override {
    return {{"phm_down_bias", down_.bias}, {"phm_down_s", down_.s}, {"phm_down_t", down_.t},
            {"phm_up_bias", up_.bias},     {"phm_up_s", up_.s},     {"phm_up_t", up_.t}};
  }
  std::optional<at::Tensor> delta(const models::SlotBase&) const override { return std::nullopt; }

 private:
  at::Tensor a_;
  Layer down_, up_;
  CompacterSlot::Options options_;
};

bool is_adapter(const AdapterConfig& config) { return option_of(config, "form") == "adapter"; }

/// d = out / reduction of the adapter form, which n divides as it divides out.
int64_t bottleneck_of(const Target& target, const AdapterConfig& config) {
  const auto n = option_of(config, "n").get<int64_t>(), reduction = option_of(config, "reduction").get<int64_t>();
  const int64_t out = target.slot.out;
  if (out % reduction == 0 && out % n == 0 && (out / reduction) % n == 0) return out / reduction;
  throw core::UserError(
      fmt::format("algorithms/adapters: options.n = {} and reduction = {} do not divide the {} outputs of {}", n,
                  reduction, out, target.slot.path),
      "n has to divide the outputs, and the outputs over reduction");
}

/// n, which divides both sides of the slot.
int64_t factors_of(const Target& target, const AdapterConfig& config) {
  const auto n = option_of(config, "n").get<int64_t>();
  if (target.slot.in % n == 0 && target.slot.out % n == 0) return n;
  throw core::UserError(fmt::format("algorithms/adapters: options.n = {} does not divide the sides of {} ({} x {})", n,
                                    target.slot.path, target.slot.out, target.slot.in),
                        "choose a common divisor, or exclude the module");
}

/// Glorot-uniform for n matrices [size, 1], gain sqrt(2).
at::Tensor glorot(const SlotInit& init, const std::string& purpose, int64_t n, int64_t size) {
  const double bound = std::sqrt(2.0) * std::sqrt(6.0 / static_cast<double>(size + 1));
  return at::empty({n, size}, at::kFloat).uniform_(-bound, bound, generator_for(init, purpose));
}

class Compacter final : public Parametrisation {
 public:
  std::string name() const override { return "compacter"; }
  std::string summary() const override {
    return "sum of Kronecker products with factors that all slots share (Compacter's layer, arXiv 2106.04647)";
  }
  Traits traits() const override {
    return {.zero_at_init = false, .uses_rank = false, .trains_shared = true, .change = Change::kDense};
  }
  Change change(const AdapterConfig& config) const override {
    return is_adapter(config) ? Change::kNone : traits().change;
  }
  /// The sum over i of A_i (x) s_i t_i^T is linear in each of the three alone.
  TensorTraits tensor_traits(std::string_view name) const override { return {.averages_exactly = name == "phm_t"}; }
  core::Json options() const override { return {{"form", "linear"}, {"n", 4}, {"reduction", 32}}; }
  std::optional<std::string> problem(const AdapterConfig& config) const override;
  Counts count(std::span<const Target> targets, const AdapterConfig& config) const override {
    const auto n = option_of(config, "n").get<int64_t>();
    int64_t all = n * n * n;
    for (const Target& target : targets) {
      if (is_adapter(config)) {
        all += 3 * (target.slot.out + bottleneck_of(target, config));
      } else {
        (void)factors_of(target, config);
        all += target.slot.in + target.slot.out;
      }
    }
    return {all, all};
  }
  std::shared_ptr<SlotAdapter> make(const SlotInit& init) const override {
    const at::NoGradGuard no_grad;
    const auto n = init.option<int64_t>("n");
    const models::Slot& slot = init.target.slot;
    const at::Tensor a = init.shared("phm_rule", [&] {
      const auto generator = at::detail::createCPUGenerator(core::derive_seed(init.seed, "shared.phm_rule"));
      return leaf(at::empty({n, n, n}, at::kFloat).normal_(0, 1e-4, generator), init.device);
    });
    const CompacterSlot::Options options{init.config.dropout, slot.path};
    if (is_adapter(init.config)) {
      const int64_t d = bottleneck_of(init.target, init.config);
      const auto layer = [&](const std::string& name, int64_t in, int64_t out) {
        return CompacterAdapterSlot::Layer{leaf(glorot(init, name + "_s", n, in / n), init.device),
                                           leaf(glorot(init, name + "_t", n, out / n), init.device),
                                           leaf(at::zeros({out}, at::kFloat), init.device)};
      };
      return std::make_shared<CompacterAdapterSlot>(a, layer(".phm_down", slot.out, d), layer(".phm_up", d, slot.out),
                                                    options);
    }
    (void)factors_of(init.target, init.config);
    return std::make_shared<CompacterSlot>(a, leaf(glorot(init, ".phm_s", n, slot.in / n), init.device),
                                           leaf(glorot(init, ".phm_t", n, slot.out / n), init.device), options);
  }
};

std::optional<std::string> Compacter::problem(const AdapterConfig& config) const {
  const auto n = option_of(config, "n").get<int64_t>();
  if (n < 1) return fmt::format("options.n: must be at least 1, found {}", n);
  const core::Json form = option_of(config, "form");
  if (form != "linear" && form != "adapter")
    return fmt::format("options.form: {} is none of linear, adapter", form.dump());
  if (option_of(config, "reduction").get<int64_t>() < 1) return "options.reduction: must be at least 1";
  if (form == "linear" && config.options.contains("reduction"))
    return "options.reduction is of form: adapter, this one is linear";
  if (form == "adapter" && config.target_regex.empty() && config.target_modules == AdapterConfig().target_modules)
    return "form: adapter sits on the last linear module of a sub-layer: name them in target_modules, "
           "[o_proj, down_proj] of a decoder";
  return std::nullopt;
}

}  // namespace

const Parametrisation& compacter() {
  static const Compacter instance;
  return instance;
}

}  // namespace moraine::algorithms::adapters
