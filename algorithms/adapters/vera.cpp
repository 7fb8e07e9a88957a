#include "algorithms/adapters/vera.h"

#include <algorithm>
#include <cmath>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros.h>
#include <c10/core/ScalarType.h>

#include "algorithms/adapters/peft_fields.h"

namespace moraine::algorithms::adapters {
namespace {

constexpr const char *kA = "vera_A", *kB = "vera_B";

struct Widths {
  int64_t in = 0, out = 0;
};

Widths widest(std::span<const Target> targets) {
  Widths widths;
  for (const Target& target : targets) {
    widths.in = std::max(widths.in, target.slot.in);
    widths.out = std::max(widths.out, target.slot.out);
  }
  return widths;
}

/// In PEFT's order of operations, whose last bit matters.
double kaiming_bound(int64_t fan) { return std::sqrt(3.0) * (std::sqrt(2.0) / std::sqrt(static_cast<double>(fan))); }

/// A, or B, which is drawn behind it.
at::Tensor projection(const SlotInit& init, bool is_b) {
  const int64_t r = init.target.rank;
  const auto [in, out] = widest(init.targets);
  const auto generator = at::detail::createCPUGenerator(init.option<uint64_t>("projection_prng_key"));
  at::Tensor drawn = at::empty({r, in}, at::kFloat).uniform_(-kaiming_bound(in), kaiming_bound(in), generator);
  if (is_b) drawn = at::empty({out, r}, at::kFloat).uniform_(-kaiming_bound(r), kaiming_bound(r), generator);
  return drawn.to(init.device);
}

class VeraSlot final : public SlotAdapter {
 public:
  struct Frozen {
    at::Tensor a, b;  // of all slots
    double dropout = 0;
    std::string path = {};
  };
  VeraSlot(at::Tensor b, at::Tensor d, Frozen frozen)
      : b_(std::move(b)), d_(std::move(d)), frozen_(std::move(frozen)) {}

  at::Tensor forward(const at::Tensor& x, const models::SlotBase& base, const models::Pass& pass) override {
    const at::Tensor y = base.forward(x);
    const at::ScalarType type = c10::promoteTypes(compute_type(), x.scalar_type());
    const at::Tensor in = dropped(x.to(type), frozen_.dropout, pass, frozen_.path);
    const at::Tensor inner = at::linear(in, columns(base).to(type)) * d_.to(type);
    return (y + at::linear(inner, rows().to(type)) * b_.to(type)).to(y.scalar_type());
  }
  models::NamedTensors parameters() const override { return {{"vera_lambda_b", b_}, {"vera_lambda_d", d_}}; }
  std::optional<at::Tensor> delta(const models::SlotBase& base) const override {
    const Factored factors = *factored(base);
    return at::matmul(factors.parts[0].first, factors.parts[0].second);
  }
  std::optional<Factored> factored(const models::SlotBase& base) const override {
    const at::NoGradGuard no_grad;
    const at::ScalarType type = compute_type();
    return Factored{{{b_.to(type).unsqueeze(1) * rows(), d_.to(type).unsqueeze(1) * columns(base)}}};
  }

 private:
  at::ScalarType compute_type() const {
    return c10::promoteTypes(c10::promoteTypes(at::kFloat, frozen_.a.scalar_type()),
                             c10::promoteTypes(b_.scalar_type(), d_.scalar_type()));
  }
  at::Tensor columns(const models::SlotBase& base) const { return frozen_.a.narrow(1, 0, base.weight.size(1)); }
  at::Tensor rows() const { return frozen_.b.narrow(0, 0, b_.size(0)); }

  at::Tensor b_, d_;
  Frozen frozen_;
};

const PeftFields& vera_fields() {
  static const PeftFields fields = peft_fields("VERA", R"({
    "bias": "none", "d_initial": 0.1, "fan_in_fan_out": false, "init_weights": true, "layers_pattern": null,
    "layers_to_transform": null, "modules_to_save": null, "projection_prng_key": 0, "r": 256, "save_projection": true,
    "vera_dropout": 0.0})",
                                               R"([
    "d_initial", "init_weights", "layers_to_transform", "projection_prng_key", "r", "save_projection",
    "vera_dropout"])");
  return fields;
}

class Vera final : public Parametrisation {
 public:
  std::string name() const override { return "vera"; }
  std::string summary() const override {
    return "trained vectors around two frozen random matrices that all slots share (VeRA, arXiv 2310.11454)";
  }
  Traits traits() const override { return {.rank_fits = false}; }
  /// diag(b) B diag(d) A is bilinear in b and d.
  TensorTraits tensor_traits(std::string_view name) const override {
    return {.averages_exactly = name == "vera_lambda_b"};
  }
  core::Json options() const override {
    return {{"projection_prng_key", 0}, {"d_initial", 0.1}, {"save_projection", false}};
  }
  std::optional<std::string> problem(const AdapterConfig& config) const override {
    const AdapterConfig plain;
    if (config.alpha != plain.alpha || config.init != plain.init || config.use_rslora || !config.rank_pattern.empty() ||
        !config.alpha_pattern.empty())
      return "vera has one rank and the scale 1: leave alpha, init, use_rslora and patterns out";
    if (!config.exclude_modules.empty() || !config.exclude_regex.empty())
      return "vera has no exclusions in PEFT: name the target_modules that are meant, or give target_regex";
    if (option_of(config, "projection_prng_key").get<int64_t>() < 0)
      return "options.projection_prng_key must be at least 0";
    return std::nullopt;
  }
  std::vector<std::string> kept_shared(const AdapterConfig& config) const override {
    if (!option_of(config, "save_projection").get<bool>()) return {};
    return {kA, kB};
  }
  Counts count(std::span<const Target> targets, const AdapterConfig& config) const override {
    int64_t trained = 0;
    for (const Target& target : targets) trained += target.rank + target.slot.out;
    const auto [in, out] = widest(targets);
    return {trained, kept_shared(config).empty() ? trained : trained + config.rank * (in + out)};
  }
  std::shared_ptr<SlotAdapter> make(const SlotInit& init) const override {
    const at::NoGradGuard no_grad;
    const at::Tensor d = at::full({init.target.rank}, init.option<double>("d_initial"), at::kFloat);
    return std::make_shared<VeraSlot>(leaf(at::zeros({init.target.slot.out}, at::kFloat), init.device),
                                      leaf(d, init.device),
                                      VeraSlot::Frozen{init.shared(kA, [&] { return projection(init, false); }),
                                                       init.shared(kB, [&] { return projection(init, true); }),
                                                       init.config.dropout, init.target.slot.path});
  }
  std::string peft_type() const override { return "VERA"; }
  core::Json peft_config(const AdapterConfig& config) const override {
    core::Json json = vera_fields().defaults;
    write_targets(config, json);
    json["r"] = config.rank;
    json["vera_dropout"] = config.dropout;
    const core::Json own = options();
    for (const auto& [name, unused] : own.items()) json[name] = option_of(config, name.c_str());
    return json;
  }
  AdapterConfig config_from_peft(const core::OrderedJson& file, const std::string& origin) const override {
    return read_peft(file, vera_fields(), origin, [&](const core::Json& values, AdapterConfig& config) {
      config.type = name();
      config.rank = whole_number(values.at("r"));
      config.dropout = values.at("vera_dropout").get<double>();
      config.options = {{"projection_prng_key", whole_number(values.at("projection_prng_key"))},
                        {"d_initial", values.at("d_initial").get<double>()},
                        {"save_projection", values.at("save_projection").get<bool>()}};
    });
  }
};

}  // namespace

const Parametrisation& vera() {
  static const Vera instance;
  return instance;
}

}  // namespace moraine::algorithms::adapters
