#include "algorithms/adapters/matryoshka.h"

#include <algorithm>
#include <cmath>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>

#include "algorithms/adapters/dylora.h"
#include "algorithms/adapters/lora.h"

namespace moraine::algorithms::adapters {
namespace {

std::vector<int64_t> trained_ranks(const AdapterConfig& config) {
  auto ranks = option_of(config, "ranks").get<std::vector<int64_t>>();
  if (!ranks.empty()) return ranks;
  for (int64_t rank = 1; rank < config.rank; rank *= 2) ranks.push_back(rank);
  ranks.push_back(config.rank);
  return ranks;
}

class MatryoshkaSlot final : public LoraSlot {
 public:
  /// weights: P / s_R, [R, 1] float32.
  MatryoshkaSlot(at::Tensor a, at::Tensor b, at::Tensor weights, bool as_trained, Options options)
      : LoraSlot(std::move(a), std::move(b), std::move(options)),
        weights_(std::move(weights)),
        as_trained_(as_trained) {}

  at::Tensor forward(const at::Tensor& x, const models::SlotBase& base, const models::Pass& pass) override {
    return (pass.training ? weighted() : used()).forward(x, base, pass);
  }
  std::optional<at::Tensor> delta(const models::SlotBase& base) const override { return used().delta(base); }
  std::optional<Factored> factored(const models::SlotBase& base) const override { return used().factored(base); }
  models::NamedTensors peft_tensors() const override { return used().peft_tensors(); }

 private:
  LoraSlot weighted() const { return {a_ * weights_, b_, options_}; }
  LoraSlot used() const { return as_trained_ ? weighted() : LoraSlot(a_, b_, options_); }

  at::Tensor weights_;
  bool as_trained_;
};

class Matryoshka final : public Parametrisation {
 public:
  std::string name() const override { return "matryoshka"; }
  std::string summary() const override {
    return "LoRA of which every first k ranks work, all trained at once (MatryoshkaLoRA, arXiv 2605.07850)";
  }
  Traits traits() const override { return {.nested_ranks = true}; }
  TensorTraits tensor_traits(std::string_view name) const override { return pair_traits(name); }
  core::Json options() const override {
    return {{"ranks", core::Json::array()}, {"as_trained", false}, {"wide_start", true}};
  }
  std::optional<std::string> problem(const AdapterConfig& config) const override {
    const core::Json ranks = option_of(config, "ranks");
    for (const core::Json& rank : ranks)
      if (!rank.is_number_integer() || rank < 1 || rank > config.rank || std::ranges::count(ranks, rank) > 1)
        return fmt::format("options.ranks: must be different whole numbers in 1 .. rank = {}, found {}", config.rank,
                           ranks.dump());
    return nested_problem(config);
  }
  Counts count(std::span<const Target> targets, const AdapterConfig&) const override {
    const int64_t factors = lora_parameters(targets);
    return {factors, factors};
  }
  std::shared_ptr<SlotAdapter> make(const SlotInit& init) const override {
    const at::NoGradGuard no_grad;
    LoraFactors start = first_factors(init);
    const int64_t rank = init.target.rank;
    if (init.option<bool>("wide_start") && init.config.init == "kaiming")
      start.a.mul_(std::sqrt(static_cast<double>(init.target.slot.in) / static_cast<double>(rank)));
    auto weights = matryoshka_weights(trained_ranks(init.config), rank, init.config.use_rslora);
    const at::Tensor column = at::from_blob(weights.data(), {rank, 1}, at::kDouble).to(init.device, at::kFloat);
    return std::make_shared<MatryoshkaSlot>(
        leaf(start.a, init.device), leaf(start.b, init.device), column, init.option<bool>("as_trained"),
        LoraSlot::Options{init.target.scale, init.config.dropout, init.target.slot.path});
  }
  std::string peft_type() const override { return "LORA"; }
  core::Json peft_config(const AdapterConfig& config) const override { return lora_peft_config(config); }
};

}  // namespace

std::vector<double> matryoshka_weights(const std::vector<int64_t>& ranks, int64_t rank, bool use_rslora) {
  std::vector<double> weights(static_cast<size_t>(rank), 0);
  const double whole = scale_of(1, rank, use_rslora);
  for (const int64_t r : ranks)
    for (int64_t i = 0; i < r; ++i) weights[static_cast<size_t>(i)] += scale_of(1, r, use_rslora) / whole;
  return weights;
}

const Parametrisation& matryoshka() {
  static const Matryoshka instance;
  return instance;
}

}  // namespace moraine::algorithms::adapters
