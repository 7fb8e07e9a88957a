#include "algorithms/adapters/shira.h"

#include <algorithm>
#include <cmath>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/randperm.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <c10/core/ScalarType.h>

#include "algorithms/adapters/lora.h"
#include "core/error.h"

namespace moraine::algorithms::adapters {
namespace {

class ShiraSlot final : public SlotAdapter {
 public:
  struct Options {
    int64_t in, out;
    double dropout;
    std::string path;
    bool stores_indices;
  };
  /// indices: [2, K] int32.
  ShiraSlot(at::Tensor values, at::Tensor indices, Options options)
      : values_(std::move(values)), indices_(std::move(indices)), options_(std::move(options)) {}

  at::Tensor forward(const at::Tensor& x, const models::SlotBase& base, const models::Pass& pass) override {
    const at::ScalarType type = c10::promoteTypes(at::kFloat, x.scalar_type());
    // One product for both; a narrower weight would round v away.
    if (x.scalar_type() == type && base.weight.scalar_type() == type && !(pass.training && options_.dropout > 0))
      return models::apply_linear(x, base.weight + scattered(type), base.bias);
    const at::Tensor y = base.forward(x);
    const at::Tensor in = dropped(x.to(type), options_.dropout, pass, options_.path);
    return (y + at::linear(in, scattered(type))).to(y.scalar_type());
  }
  models::NamedTensors parameters() const override { return {{"shira_weight", values_}}; }
  models::NamedTensors state() const override {
    if (!options_.stores_indices) return {};
    return {{"shira_indices", indices_}};
  }
  std::optional<at::Tensor> delta(const models::SlotBase&) const override {
    const at::NoGradGuard no_grad;
    return scattered(c10::promoteTypes(at::kFloat, values_.scalar_type()));
  }
  models::NamedTensors peft_tensors() const override {
    return {{"shira_indices", indices_}, {"shira_weight", values_}};
  }

 private:
  /// S, dense.
  at::Tensor scattered(at::ScalarType type) const {
    const at::Tensor flat = indices_.select(0, 0).to(at::kLong) * options_.in + indices_.select(0, 1);
    return at::zeros({options_.out * options_.in}, values_.options().dtype(type).requires_grad(false))
        .scatter(0, flat, values_.to(type))
        .view({options_.out, options_.in});
  }

  at::Tensor values_, indices_;
  Options options_;
};

/// Every f-th row and the main diagonal, of a matrix of rows x columns.
struct Structure {
  int64_t rows, columns, every;
  int64_t entries() const {
    const auto full = [&](int64_t of) { return (of + every - 1) / every; };
    const int64_t diagonal = std::min(rows, columns);
    return full(rows) * columns + diagonal - full(diagonal);
  }
};

int64_t wanted_entries(const Target& target, const AdapterConfig& config) {
  const int64_t in = target.slot.in, out = target.slot.out;
  const auto density = option_of(config, "density").get<double>();
  const auto entries = density > 0 ? std::max<int64_t>(1, std::llround(density * static_cast<double>(in * out)))
                                   : target.rank * (in + out);
  if (entries <= in * out) return entries;
  throw core::UserError(fmt::format("algorithms/adapters: {} has {} x {} entries, rank {} asks for {}",
                                    target.slot.path, out, in, target.rank, entries),
                        fmt::format("choose a rank up to {}, or a density", in * out / (in + out)));
}

Structure structure_of(const Target& target, const AdapterConfig& config) {
  const int64_t in = target.slot.in, out = target.slot.out;
  const double share = static_cast<double>(in * out) / static_cast<double>(wanted_entries(target, config));
  return {out, in, std::max<int64_t>(1, std::llround(share))};
}

int64_t entries_of(const Target& target, const AdapterConfig& config) {
  if (option_of(config, "mask") == "struct") return structure_of(target, config).entries();
  return wanted_entries(target, config);
}

bool by_gradient(const AdapterConfig& config) {
  const core::Json mask = option_of(config, "mask");
  return mask == "grad" || mask == "snip";
}

/// Which entries come from neither the seed nor the shape.
bool stores_indices(const AdapterConfig& config) { return option_of(config, "mask") == "wm" || by_gradient(config); }

/// What of an entry decides, of all entries of the flattened weight: |w|, |g| or |w g|.
at::Tensor importance_of(const SlotInit& init, const std::string& mask) {
  if (mask == "wm") return init.base->weight.detach().to(at::kCPU, at::kFloat).abs().flatten();
  MORAINE_CHECK(init.gradient.defined(), "mask {} needs a gradient for {}", mask, init.target.slot.path);
  const at::Tensor gradient = init.gradient.to(at::kCPU, at::kFloat).flatten();
  if (mask == "grad") return gradient.abs();
  // In float64, where no product of two floats is rounded to zero.
  return init.base->weight.detach().to(at::kCPU, at::kDouble).flatten().mul(gradient.to(at::kDouble)).abs();
}

/// Positions in the flattened weight, [K] int64, ascending.
at::Tensor positions_of(const SlotInit& init) {
  const int64_t in = init.target.slot.in, out = init.target.slot.out;
  const auto mask = init.option<std::string>("mask");
  if (mask == "struct") {
    at::Tensor chosen = at::zeros({out, in}, at::kBool);
    chosen.slice(0, 0, out, structure_of(init.target, init.config).every).fill_(true);
    chosen.diagonal().fill_(true);
    return at::nonzero(chosen.flatten()).flatten();
  }
  const int64_t entries = wanted_entries(init.target, init.config);
  at::Tensor order;
  if (mask == "rand") {
    order = at::randperm(in * out, generator_for(init, ".shira_indices"), at::TensorOptions(at::kLong));
  } else if (init.fresh) {
    order = std::get<1>(at::sort(importance_of(init, mask), /*stable=*/true, /*dim=*/0, /*descending=*/true));
  } else {
    order = at::zeros({entries}, at::kLong);
  }
  return std::get<0>(at::sort(order.narrow(0, 0, entries)));
}

class Shira final : public Parametrisation {
 public:
  std::string name() const override { return "shira"; }
  std::string summary() const override {
    return "some entries of the weight, at random, the largest or those of the largest gradients (SHiRA, arXiv "
           "2406.13175)";
  }
  Traits traits() const override {
    return {.reads_base = true, .from_seed = true, .averages_exactly = true, .change = Change::kDense};
  }
  core::Json options() const override { return {{"mask", "rand"}, {"density", 0.0}, {"examples", 64}}; }
  Wants wants(const AdapterConfig& config) const override {
    return by_gradient(config) ? Wants::kGradients : Wants::kNothing;
  }
  std::optional<std::string> problem(const AdapterConfig& config) const override;
  Counts count(std::span<const Target> targets, const AdapterConfig& config) const override {
    Counts counts;
    for (const Target& target : targets) counts.trained += entries_of(target, config);
    counts.stored = (stores_indices(config) ? 3 : 1) * counts.trained;
    return counts;
  }
  std::shared_ptr<SlotAdapter> make(const SlotInit& init) const override {
    const at::NoGradGuard no_grad;
    const models::Slot& slot = init.target.slot;
    const at::Tensor positions = positions_of(init);
    const at::Tensor indices = at::stack({positions.floor_divide(slot.in), positions.remainder(slot.in)});
    return std::make_shared<ShiraSlot>(
        leaf(at::zeros({positions.size(0)}, at::kFloat), init.device), indices.to(init.device, at::kInt),
        ShiraSlot::Options{slot.in, slot.out, init.config.dropout, slot.path, stores_indices(init.config)});
  }
  std::string peft_type() const override { return "SHIRA"; }
  bool in_peft(const AdapterConfig& config) const override {
    return option_of(config, "mask") != "struct" && option_of(config, "density") == 0.0 &&
           config.rank_pattern.empty() && config.exclude_modules.empty() && config.exclude_regex.empty() &&
           config.layers_to_transform.empty();
  }
  core::Json peft_config(const AdapterConfig& config) const override;
};

std::optional<std::string> Shira::problem(const AdapterConfig& config) const {
  const core::Json mask = option_of(config, "mask");
  if (mask != "rand" && mask != "wm" && mask != "struct" && !by_gradient(config))
    return fmt::format("options.mask: {} is none of rand, wm, grad, snip, struct", mask.dump());
  if (option_of(config, "examples").get<int64_t>() < 1) return "options.examples: must be at least 1";
  if (!by_gradient(config) && config.options.contains("examples"))
    return fmt::format("options.examples is for masks grad and snip, this one is {}", mask.get<std::string>());
  const auto density = option_of(config, "density").get<double>();
  if (!(density >= 0 && density <= 1)) return fmt::format("options.density: {} is not in 0 .. 1", density);
  const AdapterConfig plain;
  if (density > 0 && (config.rank != plain.rank || !config.rank_pattern.empty()))
    return "options.density says how many entries are trained: leave rank and rank_pattern out";
  if (config.alpha != plain.alpha || config.init != plain.init || config.use_rslora || !config.alpha_pattern.empty())
    return "shira has no scale and starts at 0: leave alpha, alpha_pattern, init and use_rslora out";
  return std::nullopt;
}

core::Json Shira::peft_config(const AdapterConfig& config) const {
  if (!in_peft(config))
    throw core::UserError("algorithms/adapters: PEFT knows SHiRA of one rank in named modules, of any mask but struct",
                          "export the merged model instead");
  const core::Json targets = lora_peft_config(config).at("target_modules");
  return {{"auto_mapping", nullptr},    {"base_model_name_or_path", nullptr},
          {"fan_in_fan_out", false},    {"inference_mode", true},
          {"init_weights", true},       {"mask_type", "random"},
          {"modules_to_save", nullptr}, {"peft_type", "SHIRA"},
          {"peft_version", "0.21.0"},   {"r", config.rank},
          {"random_seed", nullptr},     {"revision", nullptr},
          {"target_modules", targets},  {"task_type", nullptr}};
}

}  // namespace

const Parametrisation& shira() {
  static const Shira instance;
  return instance;
}

}  // namespace moraine::algorithms::adapters
