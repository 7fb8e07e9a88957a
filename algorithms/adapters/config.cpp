#include "algorithms/adapters/config.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <iterator>
#include <set>
#include <system_error>

#include <fmt/ranges.h>

#include "algorithms/adapters/parametrisation.h"
#include "algorithms/adapters/python_regex.h"
#include "core/error.h"

namespace moraine::algorithms::adapters {
namespace {

constexpr double kLargestAlpha = 1e30;  // tensors of floats are multiplied by it

const core::Schema<ModuleRank>& rank_schema() {
  static const core::Schema<ModuleRank> schema = [] {
    core::Schema<ModuleRank> s;
    s.field("module", &ModuleRank::module).required().doc("Regular expression for the end of a module's path.");
    s.field("rank", &ModuleRank::rank).min(1).required().doc("Rank of the modules that match.");
    return s;
  }();
  return schema;
}

const core::Schema<ModuleAlpha>& alpha_schema() {
  static const core::Schema<ModuleAlpha> schema = [] {
    core::Schema<ModuleAlpha> s;
    s.field("module", &ModuleAlpha::module).required().doc("Regular expression for the end of a module's path.");
    s.field("alpha", &ModuleAlpha::alpha)
        .above(0)
        .max(kLargestAlpha)
        .required()
        .doc("Alpha of the modules that match.");
    return s;
  }();
  return schema;
}

bool matches_end(const std::string& path, const std::string& module) {
  return python_full_match(R"((.*\.)?()" + module + ")", path);
}

bool names(const std::string& module, const std::string& path) {
  return path == module || path.ends_with("." + module);
}

bool any_names(const std::vector<std::string>& modules, const std::string& path) {
  return std::ranges::any_of(modules, [&](const std::string& module) { return names(module, path); });
}

bool all_linear(const AdapterConfig& config) {
  return config.target_modules.size() == 1 && config.target_modules[0] == "all-linear";
}

/// The layer is the first numbered segment behind two others; a path without one is in no layer.
bool in_layers(const std::string& path, const std::vector<int64_t>& layers) {
  size_t start = path.find('.');
  start = start == std::string::npos ? start : path.find('.', start + 1);
  for (size_t end; start != std::string::npos; start = end) {
    end = path.find('.', ++start);
    if (end == std::string::npos) return false;
    int64_t number = 0;
    const auto [stop, error] = std::from_chars(path.data() + start, path.data() + end, number);
    if (error == std::errc() && stop == path.data() + end && path[start] != '-')
      return std::ranges::find(layers, number) != layers.end();
  }
  return false;
}

bool selects(const AdapterConfig& config, const std::string& path) {
  if (any_names(config.exclude_modules, path)) return false;
  if (!config.exclude_regex.empty() && python_full_match(config.exclude_regex, path)) return false;
  if (!config.target_regex.empty()) return python_full_match(config.target_regex, path);
  if (all_linear(config)) return path != "lm_head";
  if (std::ranges::find(config.target_modules, path) != config.target_modules.end())
    return true;  // as PEFT: in any layer
  return any_names(config.target_modules, path) &&
         (config.layers_to_transform.empty() || in_layers(path, config.layers_to_transform));
}

/// The first pattern that matches decides.
template <typename Pattern, typename Value>
Value value_at(const std::string& path, const std::vector<Pattern>& patterns, Value Pattern::*value, Value fallback) {
  for (const Pattern& pattern : patterns) {
    if (matches_end(path, pattern.module)) return pattern.*value;
  }
  return fallback;
}

std::string describe(std::span<const models::Slot> slots, models::SlotKind kind) {
  std::set<std::string> ends;
  std::string example = "none";
  for (const models::Slot& slot : slots) {
    if (slot.kind != kind) continue;
    if (ends.insert(slot.path.substr(slot.path.rfind('.') + 1)).second && ends.size() == 1) example = slot.path;
  }
  return fmt::format("{} slots of this model end in {}; a whole path is e.g. {}",
                     kind == models::SlotKind::kBlock ? "block" : "linear", fmt::join(ends, ", "), example);
}

/// Every name and pattern of the configuration has to match a slot of the kind: one that does not is a spelling
/// mistake.
void check_names(const AdapterConfig& config, std::span<const models::Slot> slots, models::SlotKind kind) {
  const auto require = [&](const std::string& what, const std::string& name, auto match) {
    const auto hit = [&](const models::Slot& slot) { return slot.kind == kind && match(slot.path, name); };
    if (std::ranges::none_of(slots, hit))
      throw core::UserError(fmt::format("algorithms/adapters: {} matches no slot: '{}'", what, name),
                            describe(slots, kind));
  };
  const auto by_name = [](const std::string& path, const std::string& module) { return names(module, path); };
  if (config.target_regex.empty() && !all_linear(config)) {
    for (const std::string& module : config.target_modules) require("target_modules", module, by_name);
  }
  for (const std::string& module : config.exclude_modules) require("exclude_modules", module, by_name);
  const auto by_regex = [](const std::string& path, const std::string& regex) {
    return python_full_match(regex, path);
  };
  if (!config.exclude_regex.empty()) require("exclude_regex", config.exclude_regex, by_regex);
  for (const auto& [module, rank] : config.rank_pattern) require("rank_pattern", module, matches_end);
  for (const auto& [module, alpha] : config.alpha_pattern) require("alpha_pattern", module, matches_end);
}

std::vector<std::string> names_of_types() {
  std::vector<std::string> names;
  for (const Parametrisation* type : parametrisations()) names.push_back(type->name());
  return names;
}

std::string type_name(const core::Json& value) {
  return value.is_number_integer() ? "a whole number" : value.is_number() ? "a number" : value.type_name();
}

/// Options that the type does not have or that have another type, and what the type itself minds.
std::optional<std::string> type_problem(const AdapterConfig& config) {
  const Parametrisation& type = parametrisation(config.type);
  const core::Json known = type.options();
  if (!config.options.is_object()) return "options must be a map of keys";
  for (const auto& [key, value] : config.options.items()) {
    const auto option = known.find(key);
    if (option == known.end()) {
      std::vector<std::string> names;
      for (const auto& [name, unused] : known.items()) names.push_back(name);
      return fmt::format("options.{}: type {} has no such option{}", key, config.type,
                         names.empty() ? "" : fmt::format(" (valid: {})", fmt::join(names, ", ")));
    }
    const bool fits = option->is_number_float() ? value.is_number() : type_name(value) == type_name(*option);
    if (!fits) return fmt::format("options.{}: must be {}, found {}", key, type_name(*option), value.dump());
  }
  if (!type.traits().uses_rank) {
    const AdapterConfig plain;
    if (config.rank != plain.rank || config.alpha != plain.alpha || config.init != plain.init || config.use_rslora ||
        !config.rank_pattern.empty() || !config.alpha_pattern.empty())
      return fmt::format("type {} has no rank: leave rank, alpha, their patterns, init and use_rslora out",
                         config.type);
  }
  return type.problem(config);
}

}  // namespace

const core::Schema<AdapterConfig>& adapter_schema() {
  using C = AdapterConfig;
  static const core::Schema<C> schema = [] {
    core::Schema<C> s;
    s.field("type", &C::type).choices(names_of_types()).joined_later().doc("Parametrisation of the change.");
    s.field("options", &C::options).joined_later().doc("Options of the type alone, as a map; docs/adapters.md.");
    s.field("rank", &C::rank).min(1).doc("Rank of the change; memory and compute grow linearly.");
    s.field("alpha", &C::alpha).above(0).max(kLargestAlpha).doc("The update is scaled by alpha / rank.");
    s.field("dropout", &C::dropout).min(0).max(0.999).doc("Share of the adapter's inputs that training zeroes.");
    s.field("target_modules", &C::target_modules)
        .doc("Modules by whole path or last segments; all-linear = every linear but lm_head.");
    s.field("target_regex", &C::target_regex).doc("Regular expression for whole paths; replaces target_modules.");
    s.field("exclude_modules", &C::exclude_modules).doc("Modules left alone; named as in target_modules.");
    s.field("exclude_regex", &C::exclude_regex)
        .joined_later()
        .doc("Regular expression for whole paths of modules left alone.");
    s.check([](const C& c) -> std::optional<std::string> {
      if (c.exclude_modules.empty() || c.exclude_regex.empty()) return std::nullopt;
      return "give exclude_modules or exclude_regex: an adapter's file holds one of them";
    });
    s.field("layers_to_transform", &C::layers_to_transform).min(0).doc("Layer numbers; empty = all.");
    s.list("rank_pattern", &C::rank_pattern, rank_schema()).doc("Other ranks for some modules.");
    s.list("alpha_pattern", &C::alpha_pattern, alpha_schema()).doc("Other alphas for some modules.");
    s.field("init", &C::init)
        .choices({"eva", "gaussian", "kaiming", "olora", "pissa"})
        .doc(
            "Start values: of A at random or from the inputs of examples (eva), with B = 0, or of both from the frozen "
            "weight, which stays as it is.");
    s.field("lr_ratio", &C::lr_ratio)
        .above(0)
        .joined_later()
        .doc("lora_B and one-dimensional tensors learn at this multiple of the learning rate (LoRA+; 16 is usual).");
    s.field("use_rslora", &C::use_rslora).doc("Scale by alpha / sqrt(rank), which keeps high ranks learning.");
    s.check([](const C& c) -> std::optional<std::string> {
      if (c.layers_to_transform.empty() || (c.target_regex.empty() && !all_linear(c))) return std::nullopt;
      return "layers_to_transform needs target_modules that are named one by one";
    });
    s.check(type_problem);
    return s;
  }();
  return schema;
}

double scale_of(double alpha, int64_t rank, bool use_rslora) {
  const auto r = static_cast<double>(rank);
  return alpha / (use_rslora ? std::sqrt(r) : r);
}

std::vector<Target> targets_of(const AdapterConfig& given, std::span<const models::Slot> slots, Matching matching) {
  AdapterConfig config = given;
  const Traits traits = parametrisation(config.type).traits();
  if (matching == Matching::kEveryName) {
    check_names(config, slots, traits.slots);
    std::ranges::stable_sort(config.rank_pattern, {}, &ModuleRank::module);
    std::ranges::stable_sort(config.alpha_pattern, {}, &ModuleAlpha::module);
  }
  std::vector<Target> targets;
  for (const models::Slot& slot : slots) {
    if (slot.kind != traits.slots || !selects(config, slot.path)) continue;
    Target target{.slot = slot,
                  .rank = value_at(slot.path, config.rank_pattern, &ModuleRank::rank, config.rank),
                  .alpha = value_at(slot.path, config.alpha_pattern, &ModuleAlpha::alpha, config.alpha)};
    if (!traits.uses_rank) target.rank = 0;
    if (traits.uses_rank && (target.rank < 1 || (traits.rank_fits && target.rank > std::min(slot.in, slot.out)))) {
      throw core::UserError(fmt::format("algorithms/adapters: rank {} does not fit {} ({} x {})", target.rank,
                                        slot.path, slot.out, slot.in),
                            fmt::format("choose a rank from 1 to {}", std::min(slot.in, slot.out)));
    }
    target.scale = scale_of(target.alpha, std::max<int64_t>(1, target.rank), config.use_rslora);
    targets.push_back(std::move(target));
  }
  if (targets.empty())
    throw core::UserError("algorithms/adapters: the adapter's targets match no slot", describe(slots, traits.slots));
  return targets;
}

int64_t lora_parameters(std::span<const Target> targets) {
  int64_t count = 0;
  for (const Target& target : targets) count += target.rank * (target.slot.in + target.slot.out);
  return count;
}

}  // namespace moraine::algorithms::adapters
