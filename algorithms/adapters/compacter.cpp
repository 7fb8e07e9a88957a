#include "algorithms/adapters/compacter.h"

#include <cmath>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/einsum.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <c10/core/ScalarType.h>

#include "core/error.h"
#include "core/hash.h"

namespace moraine::algorithms::adapters {
namespace {

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
    const int64_t n = a_.size(0);
    const at::Tensor u = at::matmul(in.reshape({-1, n, s_.size(1)}), s_.to(type).t());  // [tokens, a, i]
    const at::Tensor v = at::einsum("xai,iab->xbi", {u, a_.to(type)});
    return (y + at::matmul(v, t_.to(type)).view(y.sizes())).to(y.scalar_type());
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
  Traits traits() const override { return {.zero_at_init = false, .uses_rank = false}; }
  /// The sum over i of A_i (x) s_i t_i^T is linear in each of the three alone.
  TensorTraits tensor_traits(std::string_view name) const override { return {.averages_exactly = name == "phm_t"}; }
  core::Json options() const override { return {{"n", 4}}; }
  std::optional<std::string> problem(const AdapterConfig& config) const override {
    const auto n = option_of(config, "n").get<int64_t>();
    if (n < 1) return fmt::format("options.n: must be at least 1, found {}", n);
    return std::nullopt;
  }
  Counts count(std::span<const Target> targets, const AdapterConfig& config) const override {
    const auto n = option_of(config, "n").get<int64_t>();
    int64_t all = n * n * n;
    for (const Target& target : targets) {
      (void)factors_of(target, config);
      all += target.slot.in + target.slot.out;
    }
    return {all, all};
  }
  std::shared_ptr<SlotAdapter> make(const SlotInit& init) const override {
    const at::NoGradGuard no_grad;
    const int64_t n = factors_of(init.target, init.config);
    const models::Slot& slot = init.target.slot;
    const at::Tensor a = init.shared("phm_rule", [&] {
      const auto generator = at::detail::createCPUGenerator(core::derive_seed(init.seed, "shared.phm_rule"));
      return leaf(at::empty({n, n, n}, at::kFloat).normal_(0, 1e-4, generator), init.device);
    });
    return std::make_shared<CompacterSlot>(a, leaf(glorot(init, ".phm_s", n, slot.in / n), init.device),
                                           leaf(glorot(init, ".phm_t", n, slot.out / n), init.device),
                                           CompacterSlot::Options{init.config.dropout, slot.path});
  }
};

}  // namespace

const Parametrisation& compacter() {
  static const Compacter instance;
  return instance;
}

}  // namespace moraine::algorithms::adapters
