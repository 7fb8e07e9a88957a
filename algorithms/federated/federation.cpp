#include "algorithms/federated/federation.h"

#include <set>

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/zeros_like.h>

#include <fmt/ranges.h>

#include "algorithms/federated/weighted_sum.h"
#include "core/error.h"
#include "models/tensor_io.h"

namespace moraine::algorithms::federated {
namespace {

const core::TensorView& find(const Contribution& contribution, const std::string& name) {
  const core::TensorView* view = contribution.artefact->file().find(name);
  if (view == nullptr)
    throw core::UserError(fmt::format("algorithms/federated: {} sent no '{}'", contribution.client, name),
                          "its worker runs another version or another recipe");
  return *view;
}

}  // namespace

at::Tensor Contribution::factor(const std::string& name) const { return models::borrow(find(*this, name), artefact); }

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
          "all clients of this method send factors of one shape");
    parts.push_back(view.data);
    weights.push_back(contribution.weight);
  }
  at::Tensor sum = at::empty(first.shape, at::kFloat);
  weighted_sum(parts, weights, {sum.mutable_data_ptr<float>(), static_cast<size_t>(sum.numel())});
  return sum;
}

std::vector<std::string> Round::slots() const {
  std::set<std::string> paths;
  for (const auto& [name, tensor] : global) paths.insert(name.substr(0, name.rfind(".lora_")));
  return {paths.begin(), paths.end()};
}

bool Federation::trains(std::string_view) const { return true; }

at::Tensor Federation::penalty(const Factors&, const PruningConfig&) const { return {}; }

int64_t Federation::rank_after(const Factors&, const Factors&, int64_t rank, const PruningConfig&) const {
  return rank;
}

GlobalState Federation::aggregate(const Round& round) const {
  GlobalState next;
  for (const auto& [name, x] : round.global)
    if (trains(name.substr(name.rfind("lora_"))))
      next.factors[name] = server_step(round.optimizer, name, x, round.average(name), round.server, next.server);
  return next;
}

Federation::Traffic Federation::traffic(int64_t in, int64_t out, int64_t rank, int64_t, int64_t) const {
  const int64_t numbers = rank * ((trains("lora_A.weight") ? in : 0) + (trains("lora_B.weight") ? out : 0));
  return {numbers, numbers};
}

at::Tensor server_step(const ServerConfig& config, const std::string& name, const at::Tensor& x,
                       const at::Tensor& average, const Factors& before, Factors& moments) {
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
  MORAINE_CHECK(config.optimizer == "fedadam", "no server optimiser '{}'", config.optimizer);
  const at::Tensor m = config.beta1 * moment("m.", at::zeros_like(change)) + (1 - config.beta1) * change;
  const at::Tensor v = config.beta2 * moment("v.", at::full_like(change, config.tau * config.tau)) +
                       (1 - config.beta2) * change * change;
  moments[m_name] = m;
  moments[v_name] = v;
  return (from + config.learning_rate * m / (v.sqrt() + config.tau)).to(at::kFloat);
}

Factors cut(const Factors& factors, int64_t rank) {
  Factors out;
  for (const auto& [name, tensor] : factors) {
    const int64_t side = name.ends_with("lora_A.weight") ? 0 : 1;
    out[name] = tensor.size(side) > rank ? tensor.narrow(side, 0, rank).contiguous() : tensor;
  }
  return out;
}

}  // namespace moraine::algorithms::federated
