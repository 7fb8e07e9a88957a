#include "algorithms/adapters/dylora.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>

#include "algorithms/adapters/lora.h"
#include "core/hash.h"

namespace moraine::algorithms::adapters {
namespace {

/// The first `rank` entries of a dimension; the last of them alone receives a gradient when the others are frozen.
at::Tensor first_ranks(const at::Tensor& factor, int64_t dim, int64_t rank, bool frozen) {
  if (!frozen || rank == 1) return factor.narrow(dim, 0, rank);
  return at::cat({factor.detach().narrow(dim, 0, rank - 1), factor.narrow(dim, rank - 1, 1)}, dim);
}

struct DyloraRanks {
  int64_t min_rank;
  bool frozen;
  double alpha;
  bool use_rslora;
};

class DyloraSlot final : public LoraSlot {
 public:
  DyloraSlot(at::Tensor a, at::Tensor b, Options options, DyloraRanks ranks)
      : LoraSlot(std::move(a), std::move(b), std::move(options)), ranks_(ranks) {}

  at::Tensor forward(const at::Tensor& x, const models::SlotBase& base, const models::Pass& pass) override {
    if (!pass.training) return LoraSlot::forward(x, base, pass);
    const int64_t rank = dylora_rank(pass, ranks_.min_rank, a_.size(0));
    Options options = options_;
    options.scale = scale_of(ranks_.alpha, rank, ranks_.use_rslora);
    LoraSlot first(first_ranks(a_, 0, rank, ranks_.frozen), first_ranks(b_, 1, rank, ranks_.frozen), options);
    return first.forward(x, base, pass);
  }

 private:
  DyloraRanks ranks_;
};

class Dylora final : public Parametrisation {
 public:
  std::string name() const override { return "dylora"; }
  std::string summary() const override {
    return "LoRA of which every first b ranks work; b is drawn every step (DyLoRA, arXiv 2210.07558)";
  }
  Traits traits() const override { return {.nested_ranks = true}; }
  TensorTraits tensor_traits(std::string_view name) const override { return pair_traits(name); }
  core::Json options() const override { return {{"min_rank", 1}, {"frozen", true}}; }
  std::optional<std::string> problem(const AdapterConfig& config) const override {
    const auto lowest = option_of(config, "min_rank").get<int64_t>();
    if (lowest < 1 || lowest > config.rank)
      return fmt::format("options.min_rank: {} is not in 1 .. rank = {}", lowest, config.rank);
    return nested_problem(config);
  }
  Counts count(std::span<const Target> targets, const AdapterConfig&) const override {
    const int64_t factors = lora_parameters(targets);
    return {factors, factors};
  }
  std::shared_ptr<SlotAdapter> make(const SlotInit& init) const override {
    const at::NoGradGuard no_grad;
    const LoraFactors start = first_factors(init);
    return std::make_shared<DyloraSlot>(
        leaf(start.a, init.device), leaf(start.b, init.device),
        LoraSlot::Options{init.target.scale, init.config.dropout, init.target.slot.path},
        DyloraRanks{init.option<int64_t>("min_rank"), init.option<bool>("frozen"), init.target.alpha,
                    init.config.use_rslora});
  }
  std::string peft_type() const override { return "LORA"; }
  core::Json peft_config(const AdapterConfig& config) const override { return lora_peft_config(config); }
};

}  // namespace

int64_t dylora_rank(const models::Pass& pass, int64_t min_rank, int64_t max_rank) {
  // The remainder prefers no rank by more than max_rank / 2^64.
  const uint64_t drawn = core::derive_seed(pass.seed, fmt::format("dylora/rank/{}", pass.step));
  return min_rank + static_cast<int64_t>(drawn % static_cast<uint64_t>(max_rank - min_rank + 1));
}

std::optional<std::string> nested_problem(const AdapterConfig& config) {
  if (starts_from_base(config) || config.init == "eva")
    return fmt::format("{} starts at B = 0: init kaiming or gaussian", config.type);
  if (!config.rank_pattern.empty())
    return fmt::format("{} has the same ranks in all modules: leave rank_pattern out", config.type);
  return std::nullopt;
}

const Parametrisation& dylora() {
  static const Dylora instance;
  return instance;
}

}  // namespace moraine::algorithms::adapters
