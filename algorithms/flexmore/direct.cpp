#include "algorithms/flexmore/direct.h"

#include <algorithm>
#include <map>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>

#include "algorithms/flexmore/experts.h"
#include "core/error.h"

namespace moraine::algorithms::flexmore {
namespace {

using adapters::AdapterConfig;
using adapters::Change;

Change change_of(const AdapterConfig& config) { return adapters::parametrisation(config.type).change(config); }

bool is_nested(const AdapterConfig& config) { return adapters::parametrisation(config.type).traits().nested_ranks; }

models::LowRank pair_of(const adapters::Factored& change) {
  std::vector<at::Tensor> a, b;
  for (const auto& [part_b, part_a] : change.parts) {
    a.push_back(part_a.detach().to(at::kCPU, at::kFloat));
    b.push_back(part_b.detach().to(at::kCPU, at::kFloat));
  }
  return {at::cat(a, 0).contiguous(), at::cat(b, 1).mul(change.scale).contiguous()};
}

std::string matrix_path(size_t layer, const char* name) { return ffn_slot(layer) + "." + name; }

}  // namespace

AdapterConfig on_ffn(AdapterConfig config) {
  config.target_modules = {"gate_proj", "up_proj", "down_proj"};
  return config;
}

std::optional<std::string> expert_problem(const AdapterConfig& config) {
  if (change_of(config) == Change::kNone)
    return fmt::format("adapter: type {} is no change of weights, and an expert is one of the FFN's", config.type);
  if (change_of(config) == Change::kBias)
    return fmt::format("adapter: type {} changes biases, and experts have none", config.type);
  const AdapterConfig plain;
  if (config.target_modules != plain.target_modules || !config.target_regex.empty() ||
      !config.exclude_modules.empty() || !config.exclude_regex.empty() || !config.layers_to_transform.empty())
    return "adapter: an expert is a change of all three matrices of every FFN: leave the targets out";
  if (!config.rank_pattern.empty()) return "adapter: an expert has one rank: leave rank_pattern out";
  if (is_nested(config) && !adapters::ranks_stand_alone(config))
    return "adapter: options.as_trained gives the ranks other weights than they have when they stand alone, and an "
           "expert is cut: leave it out";
  return std::nullopt;
}

adapters::Counts adapter_counts(const AdapterConfig& config, const models::DecoderConfig& public_model) {
  const AdapterConfig placed = on_ffn(config);
  return adapters::parametrisation(config.type)
      .count(adapters::targets_of(placed, models::decoder_slots(public_model)), placed);
}

bool trains_factors(const DomainConfig& domain) {
  return domain.train == "direct" && (!domain.adapter || change_of(*domain.adapter) == Change::kFactors);
}

int64_t trained_rank(const DomainConfig& domain) {
  if (!trains_factors(domain)) return 0;
  return domain.adapter ? adapters::factored_rank(*domain.adapter) : given_rank(domain).value();
}

bool chooses_rank(const DomainConfig& domain) {
  return domain.rank == "auto" && (!trains_factors(domain) || is_nested(*domain.adapter));
}

int64_t fixed_rank(const DomainConfig& domain) {
  if (const auto given = given_rank(domain)) return *given;
  return domain.rank == "full" ? 0 : trained_rank(domain);
}

int64_t cut_to(const DomainConfig& domain, int64_t rank) { return rank == trained_rank(domain) ? 0 : rank; }

std::vector<int64_t> ranks_within(const DomainConfig& domain, const std::vector<int64_t>& ranks) {
  std::vector<int64_t> within = ranks;
  if (trains_factors(domain)) std::erase_if(within, [&](int64_t rank) { return rank > trained_rank(domain); });
  return within;
}

std::vector<models::FfnExpert> adapted_layers(const adapters::Adapter& adapter, const models::Decoder& model) {
  models::Decoder placed = model.share();  // hands out the functions by their paths
  adapter.attach(placed);
  std::vector<models::FfnExpert> layers(static_cast<size_t>(model.config().num_layers));
  for (size_t l = 0; l < layers.size(); ++l)
    layers[l].functions = {placed.attached(matrix_path(l, "gate_proj")), placed.attached(matrix_path(l, "up_proj")),
                           placed.attached(matrix_path(l, "down_proj"))};
  return layers;
}

std::vector<models::FfnExpert> expert_layers(const adapters::Adapter& adapter, const models::Decoder& model) {
  const at::NoGradGuard no_grad;
  std::map<std::string, size_t> number;
  for (size_t i = 0; i < adapter.targets().size(); ++i) number[adapter.targets()[i].slot.path] = i;
  const auto function = [&](const std::string& path) -> const adapters::SlotAdapter& {
    return adapter.function(number.at(path));
  };
  const auto factors = [&](const std::string& path) {
    const auto change = function(path).factored(model.base(path));
    MORAINE_CHECK(change.has_value(), "type {} has no factors", adapter.config().type);
    models::LowRank pair = pair_of(*change);
    MORAINE_CHECK_EQ(pair.a.size(0), adapters::factored_rank(adapter.config()));
    return pair;
  };
  const auto changed = [&](const std::string& path) {
    const auto change = function(path).delta(model.base(path));
    MORAINE_CHECK(change.has_value(), "type {} has no dense change", adapter.config().type);
    return (model.base(path).weight.detach().to(at::kFloat) + change->detach()).to(at::kCPU, at::kFloat).contiguous();
  };
  const bool dense = change_of(adapter.config()) == Change::kDense;
  std::vector<models::FfnExpert> layers(static_cast<size_t>(model.config().num_layers));
  for (size_t l = 0; l < layers.size(); ++l) {
    const std::string gate = matrix_path(l, "gate_proj"), up = matrix_path(l, "up_proj"),
                      down = matrix_path(l, "down_proj");
    if (dense)
      layers[l].gate = changed(gate), layers[l].up = changed(up), layers[l].down = changed(down);
    else
      layers[l].gate_delta = factors(gate), layers[l].up_delta = factors(up), layers[l].down_delta = factors(down);
  }
  return layers;
}

std::vector<double> scales_by_rank(const AdapterConfig& config) {
  std::vector<double> scales;
  if (!is_nested(config)) return scales;
  const double whole = adapters::scale_of(config.alpha, config.rank, config.use_rslora);
  for (int64_t rank = 1; rank <= config.rank; ++rank)
    scales.push_back(adapters::scale_of(config.alpha, rank, config.use_rslora) / whole);
  return scales;
}

}  // namespace moraine::algorithms::flexmore
