#include "algorithms/adapters/nola.h"

#include <algorithm>
#include <cmath>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include "algorithms/adapters/lora.h"
#include "core/hash.h"

namespace moraine::algorithms::adapters {
namespace {

/// Draws the bases in order, some at a time: use(number of the first, bases as rows [n, size]).
template <typename Use>
void for_bases(int64_t count, int64_t size, uint64_t seed, int64_t at_once, const at::Tensor& like, Use&& use) {
  const at::Generator generator = at::detail::createCPUGenerator(seed);
  const double bound = 1.0 / std::sqrt(static_cast<double>(count));
  const int64_t step = std::clamp<int64_t>(at_once / size, 1, count);
  for (int64_t first = 0; first < count; first += step) {
    const at::Tensor bases = at::empty({std::min(step, count - first), size}, at::kFloat);
    use(first, bases.uniform_(-bound, bound, generator).to(like.device(), like.scalar_type()));
  }
}

/// Saves nothing but the seed for the backward pass.
class Combination : public torch::autograd::Function<Combination> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& c, int64_t seed, int64_t size,
                            int64_t at_once) {
    context->saved_data["seed"] = seed;
    context->saved_data["size"] = size;
    context->saved_data["at_once"] = at_once;
    context->saved_data["count"] = c.size(0);
    at::Tensor sum = at::zeros({size}, c.options().requires_grad(false));
    for_bases(c.size(0), size, static_cast<uint64_t>(seed), at_once, c, [&](int64_t first, const at::Tensor& bases) {
      sum.add_(at::matmul(c.narrow(0, first, bases.size(0)), bases));
    });
    return sum;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    const at::Tensor& of_sum = gradients[0];
    const int64_t count = context->saved_data["count"].toInt();
    at::Tensor of_c = at::empty({count}, of_sum.options());
    for_bases(count, context->saved_data["size"].toInt(), static_cast<uint64_t>(context->saved_data["seed"].toInt()),
              context->saved_data["at_once"].toInt(), of_sum, [&](int64_t first, const at::Tensor& bases) {
                of_c.narrow(0, first, bases.size(0)).copy_(at::matmul(bases, of_sum));
              });
    return {of_c, at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

class NolaSlot final : public SlotAdapter {
 public:
  struct Seeds {
    uint64_t a, b;
  };
  NolaSlot(at::Tensor a, at::Tensor b, at::Tensor a0, int64_t out, Seeds seeds, LoraSlot::Options options)
      : a_(std::move(a)),
        b_(std::move(b)),
        a0_(std::move(a0)),
        out_(out),
        seeds_(seeds),
        options_(std::move(options)) {}

  at::Tensor forward(const at::Tensor& x, const models::SlotBase& base, const models::Pass& pass) override {
    return as_lora().forward(x, base, pass);
  }
  models::NamedTensors parameters() const override { return {{"nola_a", a_}, {"nola_b", b_}}; }
  std::optional<at::Tensor> delta(const models::SlotBase& base) const override {
    const at::NoGradGuard no_grad;
    return as_lora().delta(base);
  }
  std::optional<Factored> factored(const models::SlotBase& base) const override {
    const at::NoGradGuard no_grad;
    return as_lora().factored(base);
  }
  models::NamedTensors peft_tensors() const override {
    const at::NoGradGuard no_grad;
    return as_lora().peft_tensors();
  }

 private:
  LoraSlot as_lora() const {
    const int64_t rank = a0_.size(0);
    return {a0_ + random_combination(a_, seeds_.a, rank, a0_.size(1)), random_combination(b_, seeds_.b, out_, rank),
            options_};
  }

  at::Tensor a_, b_, a0_;
  int64_t out_;
  Seeds seeds_;
  LoraSlot::Options options_;
};

class Nola final : public Parametrisation {
 public:
  std::string name() const override { return "nola"; }
  std::string summary() const override {
    return "LoRA whose factors are combinations of random ones (NOLA, arXiv 2310.02556)";
  }
  Traits traits() const override { return {.from_seed = true}; }
  /// B A is bilinear in the coefficients of B and of A.
  TensorTraits tensor_traits(std::string_view name) const override { return {.averages_exactly = name == "nola_b"}; }
  core::Json options() const override { return {{"bases", 512}}; }
  std::optional<std::string> problem(const AdapterConfig& config) const override {
    const auto bases = option_of(config, "bases").get<int64_t>();
    if (bases < 1) return fmt::format("options.bases: must be at least 1, found {}", bases);
    if (starts_from_base(config) || config.init == "eva") return "nola starts at B = 0: init kaiming or gaussian";
    return std::nullopt;
  }
  Counts count(std::span<const Target> targets, const AdapterConfig& config) const override {
    const int64_t all = 2 * option_of(config, "bases").get<int64_t>() * static_cast<int64_t>(targets.size());
    return {all, all};
  }
  std::shared_ptr<SlotAdapter> make(const SlotInit& init) const override {
    const at::NoGradGuard no_grad;
    const at::Tensor zeros = at::zeros({init.option<int64_t>("bases")}, at::kFloat);
    const auto seed = [&](const char* purpose) {
      return core::derive_seed(init.seed, init.target.slot.path + purpose);
    };
    return std::make_shared<NolaSlot>(leaf(zeros, init.device), leaf(zeros.clone(), init.device),
                                      first_factors(init).a.to(init.device), init.target.slot.out,
                                      NolaSlot::Seeds{seed(".nola_a"), seed(".nola_b")},
                                      LoraSlot::Options{init.target.scale, init.config.dropout, init.target.slot.path});
  }
  std::string peft_type() const override { return "LORA"; }
  core::Json peft_config(const AdapterConfig& config) const override { return lora_peft_config(config); }
};

}  // namespace

at::Tensor random_combination(const at::Tensor& c, uint64_t seed, int64_t rows, int64_t columns, int64_t at_once) {
  return Combination::apply(c, static_cast<int64_t>(seed), rows * columns, at_once).view({rows, columns});
}

const Parametrisation& nola() {
  static const Nola instance;
  return instance;
}

}  // namespace moraine::algorithms::adapters
