#include "algorithms/adapters/ia3.h"

#include <algorithm>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/ones.h>
#include <c10/core/ScalarType.h>

#include "algorithms/adapters/peft_fields.h"
#include "algorithms/adapters/python_regex.h"
#include "core/error.h"

namespace moraine::algorithms::adapters {
namespace {

constexpr const char *kNames = "feedforward_modules", *kRegex = "feedforward_regex";

using Names = std::vector<std::string>;

bool is_feedforward(const AdapterConfig& config, const std::string& path) {
  const auto regex = option_of(config, kRegex).get<std::string>();
  if (!regex.empty()) return python_full_match(regex, path);
  const auto names = option_of(config, kNames).get<Names>();
  return std::ranges::any_of(names, [&](const std::string& name) { return path.ends_with(name); });
}

class Ia3Slot final : public SlotAdapter {
 public:
  Ia3Slot(at::Tensor factors, bool feedforward) : factors_(std::move(factors)), feedforward_(feedforward) {}

  at::Tensor forward(const at::Tensor& x, const models::SlotBase& base, const models::Pass&) override {
    if (feedforward_) return base.forward(scaled(x));
    return scaled(base.forward(x));
  }
  models::NamedTensors parameters() const override { return {{"ia3_l", factors_}}; }
  std::optional<at::Tensor> delta(const models::SlotBase& base) const override {
    const at::NoGradGuard no_grad;
    return base.weight.to(compute_type()) * (factors_ - 1);
  }
  at::Tensor bias_delta(const models::SlotBase& base) const override {
    const at::NoGradGuard no_grad;
    if (feedforward_ || !base.bias.defined()) return {};
    return base.bias.to(compute_type()) * (factors_.flatten() - 1);
  }

 private:
  at::ScalarType compute_type() const { return c10::promoteTypes(at::kFloat, factors_.scalar_type()); }
  at::Tensor scaled(const at::Tensor& x) const {
    return (x.to(c10::promoteTypes(compute_type(), x.scalar_type())) * factors_.flatten()).to(x.scalar_type());
  }

  at::Tensor factors_;  // [1, in] or [out, 1]
  bool feedforward_;
};

const PeftFields& ia3_fields() {
  static const PeftFields fields = peft_fields("IA3", R"({
    "exclude_modules": null, "fan_in_fan_out": false, "feedforward_modules": null, "init_ia3_weights": true,
    "modules_to_save": null})",
                                               R"(["exclude_modules", "feedforward_modules", "init_ia3_weights"])");
  return fields;
}

class Ia3 final : public Parametrisation {
 public:
  std::string name() const override { return "ia3"; }
  std::string summary() const override {
    return "trained factors of a layer's outputs, or of its inputs in feed-forward modules ((IA)^3, arXiv 2205.05638)";
  }
  Traits traits() const override { return {.uses_rank = false, .averages_exactly = true, .change = Change::kDense}; }
  core::Json options() const override { return {{kNames, core::Json::array()}, {kRegex, ""}}; }
  std::optional<std::string> problem(const AdapterConfig& config) const override {
    if (config.dropout != 0 || !config.layers_to_transform.empty())
      return "ia3 has no dropout and no choice of layers: leave dropout and layers_to_transform out";
    const core::Json names = option_of(config, kNames);
    if (!std::ranges::all_of(names, [](const core::Json& name) { return name.is_string() && name != ""; }))
      return "options.feedforward_modules must be names";
    if (!names.empty() && option_of(config, kRegex) != "")
      return "give options.feedforward_modules or options.feedforward_regex: an adapter's file holds one of them";
    if (!config.target_regex.empty() || config.target_modules == Names{"all-linear"}) return std::nullopt;
    for (const auto& name : names.get<Names>())
      if (std::ranges::find(config.target_modules, name) == config.target_modules.end())
        return fmt::format("options.feedforward_modules: '{}' is not among target_modules", name);
    return std::nullopt;
  }
  /// Throws UserError if a name of a feed-forward module matches no target: it is a spelling mistake.
  Counts count(std::span<const Target> targets, const AdapterConfig& config) const override {
    for (const auto& name : option_of(config, kNames).get<Names>())
      if (std::ranges::none_of(targets, [&](const Target& target) { return target.slot.path.ends_with(name); }))
        throw core::UserError(
            fmt::format("algorithms/adapters: options.feedforward_modules matches no target: '{}'", name),
            fmt::format("a target is e.g. {}", targets.front().slot.path));
    int64_t all = 0;
    for (const Target& target : targets)
      all += is_feedforward(config, target.slot.path) ? target.slot.in : target.slot.out;
    return {all, all};
  }
  std::shared_ptr<SlotAdapter> make(const SlotInit& init) const override {
    const models::Slot& slot = init.target.slot;
    const bool feedforward = is_feedforward(init.config, slot.path);
    const at::Tensor ones = feedforward ? at::ones({1, slot.in}, at::kFloat) : at::ones({slot.out, 1}, at::kFloat);
    return std::make_shared<Ia3Slot>(leaf(ones, init.device), feedforward);
  }
  std::string peft_type() const override { return "IA3"; }
  core::Json peft_config(const AdapterConfig& config) const override {
    core::Json json = ia3_fields().defaults;
    write_targets(config, json);
    const core::Json regex = option_of(config, kRegex);
    json[kNames] = regex == "" ? option_of(config, kNames) : regex;
    return json;
  }
  AdapterConfig config_from_peft(const core::OrderedJson& file, const std::string& origin) const override {
    return read_peft(file, ia3_fields(), origin, [&](const core::Json& values, AdapterConfig& config) {
      config.type = name();
      const core::Json& modules = values.at(kNames);
      if (modules.is_string())
        config.options[kRegex] = modules;
      else if (!modules.is_null())
        config.options[kNames] = modules.get<Names>();
    });
  }
};

}  // namespace

const Parametrisation& ia3() {
  static const Ia3 instance;
  return instance;
}

}  // namespace moraine::algorithms::adapters
