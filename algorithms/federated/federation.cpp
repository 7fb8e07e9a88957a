#include "algorithms/federated/federation.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/sign.h>
#include <ATen/ops/zeros_like.h>

#include <fmt/ranges.h>

#include "algorithms/federated/weighted_sum.h"
#include "core/error.h"

namespace moraine::algorithms::federated {
namespace {

const core::TensorView& find(const Contribution& contribution, const std::string& name) {
  const core::TensorView* view = contribution.artefact->file().find(name);
  if (view == nullptr)
    throw core::UserError(fmt::format("algorithms/federated: {} sent no '{}'", contribution.client, name),
                          "its worker runs another version or another recipe");
  return *view;
}

at::Tensor squared_change(const ServerConfig& config, const at::Tensor& before, const at::Tensor& change) {
  if (config.optimizer == "fedadam") return config.beta2 * before + (1 - config.beta2) * change * change;
  const at::Tensor square = change * change;
  if (config.optimizer == "fedadagrad") return before + square;
  MORAINE_CHECK(config.optimizer == "fedyogi", "no server optimiser '{}'", config.optimizer);
  return before - (1 - config.beta2) * square * at::sign(before - square);
}

}  // namespace

std::optional<Refusal> unless_factors(const adapters::AdapterConfig& adapter, const std::string& what) {
  if (adapters::parametrisation(adapter.type).change(adapter) == adapters::Change::kFactors) return std::nullopt;
  return Refusal{fmt::format("{}, and the change of type {} is no product of factors", what, adapter.type),
                 "method: fedit averages tensors of any type"};
}

at::Tensor Round::average(const std::string& name) const {
  std::vector<std::span<const std::byte>> parts;
  std::vector<double> weights;
  const core::TensorView& first = find(contributions.front(), name);
  for (const auto& contribution : contributions) {
    const core::TensorView& view = find(contribution, name);
    if (view.shape != first.shape || view.dtype != core::DType::kF32)
      throw core::UserError(
          fmt::format("algorithms/federated: '{}' of {} is {} [{}], of {} float32 [{}]", name, contribution.client,
                      core::safetensors_name(view.dtype), fmt::join(view.shape, ", "), contributions.front().client,
                      fmt::join(first.shape, ", ")),
          "all clients of this method send tensors of one shape");
    parts.push_back(view.data);
    weights.push_back(contribution.weight);
  }
  at::Tensor sum = at::empty(first.shape, at::kFloat);
  weighted_sum(parts, weights, {sum.mutable_data_ptr<float>(), static_cast<size_t>(sum.numel())});
  return sum;
}

at::Tensor Federation::penalty(const Tensors&, const adapters::TrainedTensors&, const PruningConfig&) const {
  return {};
}

int64_t Federation::rank_after(const Tensors&, const Tensors&, const adapters::TrainedTensors&, int64_t rank,
                               const PruningConfig&) const {
  return rank;
}

GlobalState Federation::aggregate(const Round& round) const {
  GlobalState next;
  for (const auto& [name, x] : round.global)
    next.adapter[name] = server_step(round.optimizer, name, x, round.average(name), round.server, next.server);
  return next;
}

at::Tensor server_step(const ServerConfig& config, const std::string& name, const at::Tensor& x,
                       const at::Tensor& average, const Tensors& before, Tensors& moments) {
  if (config.optimizer == "fedavg") return average;
  const at::Tensor from = x.to(at::kDouble), change = average.to(at::kDouble) - from;
  const auto moment = [&](const std::string& kind, const at::Tensor& start) {
    const auto known = before.find(kind + name);
    return known == before.end() ? start : known->second;
  };
  const std::string m_name = "m." + name, v_name = "v." + name;
  if (config.optimizer == "fedavgm") {
    const bool first = !before.count(m_name);
    const at::Tensor m = first ? change : config.beta1 * before.at(m_name) + (1 - config.beta1) * change;
    moments[m_name] = m;
    return (from + m).to(at::kFloat);
  }
  const bool momentum = config.optimizer != "fedadagrad";
  const at::Tensor m =
      momentum ? config.beta1 * moment("m.", at::zeros_like(change)) + (1 - config.beta1) * change : change;
  const at::Tensor v = squared_change(config, moment("v.", at::full_like(change, config.tau * config.tau)), change);
  if (momentum) moments[m_name] = m;
  moments[v_name] = v;
  return (from + config.learning_rate * m / (v.sqrt() + config.tau)).to(at::kFloat);
}

void Stack::add(const std::string& slot, const at::Tensor& b, const at::Tensor& a) {
  b_[slot].push_back(b);
  a_[slot].push_back(a);
}

std::map<std::string, std::pair<at::Tensor, at::Tensor>> Stack::pairs() const {
  std::map<std::string, std::pair<at::Tensor, at::Tensor>> out;
  for (const auto& [slot, b] : b_) out[slot] = {at::cat(b, 1), at::cat(a_.at(slot), 0)};
  return out;
}

Tensors Stack::base_change() const {
  Tensors out;
  for (const auto& [slot, pair] : pairs()) {
    out[slot + kBaseB] = pair.first;
    out[slot + kBaseA] = pair.second;
  }
  return out;
}

int64_t numbers_in(const Changes& changes, bool with_frozen) {
  int64_t numbers = 0;
  for (const auto& [slot, change] : changes)
    for (size_t i = 0; i + (with_frozen ? 0 : change.frozen) < change.parts.size(); ++i)
      numbers += change.parts[i].first.numel() + change.parts[i].second.numel();
  return numbers;
}

}  // namespace moraine::algorithms::federated
