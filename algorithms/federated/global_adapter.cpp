#include "algorithms/federated/global_adapter.h"

#include <algorithm>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>

#include "core/error.h"
#include "core/hash.h"
#include "models/tensor_io.h"

namespace moraine::algorithms::federated {
namespace {

bool is_moment(const std::string& name) { return name.starts_with("m.") || name.starts_with("v."); }
bool is_base_change(const std::string& name) { return name.ends_with(kBaseA) || name.ends_with(kBaseB); }

template <typename Wanted>
Tensors tensors_that(const core::ArtefactPtr& artefact, Wanted&& wanted) {
  Tensors out;
  for (const auto& view : artefact->file().tensors())
    if (wanted(view.name)) out[view.name] = models::borrow(view, artefact);
  return out;
}

template <typename Put>
void for_values(const adapters::Adapter& adapter, const Tensors& values, Put&& put) {
  const at::NoGradGuard no_grad;
  for (auto& [name, own] : tensors_of(adapter)) {
    const auto found = values.find(name);
    if (found == values.end() || found->second.sizes() != own.sizes())
      throw core::UserError(
          fmt::format("algorithms/federated: the adapter's '{}' is missing or of another shape", name),
          "its worker ran another version or another recipe");
    put(own, found->second);
  }
}

}  // namespace

bool starts_from_weights(const adapters::AdapterConfig& adapter) {
  return adapters::parametrisation(adapter.type).traits().reads_base || adapters::starts_from_base(adapter);
}

Tensors adapter_tensors(const core::ArtefactPtr& artefact) {
  return tensors_that(artefact, [](const std::string& name) { return !is_moment(name) && !is_base_change(name); });
}

Tensors server_moments(const core::ArtefactPtr& state) { return tensors_that(state, is_moment); }

void add_base_change(const core::ArtefactPtr& state, std::map<std::string, at::Tensor>& changes) {
  const Tensors factors = tensors_that(state, is_base_change);
  for (const auto& [name, a] : factors) {
    if (!name.ends_with(kBaseA)) continue;
    const std::string slot = name.substr(0, name.rfind(kBaseA));
    const at::Tensor product = factors.at(slot + kBaseB).matmul(a);
    at::Tensor& change = changes[slot + ".weight"];
    change = change.defined() ? change + product : product;
  }
}

Tensors tensors_of(const adapters::Adapter& adapter) {
  Tensors all = trained_tensors_of(adapter);
  for (auto& [name, tensor] : adapter.state()) all[name] = tensor;
  return all;
}

Tensors trained_tensors_of(const adapters::Adapter& adapter) {
  const models::NamedTensors parameters = adapter.parameters();
  return {parameters.begin(), parameters.end()};
}

Tensors cut(const Tensors& tensors, const adapters::TrainedTensors& trained, int64_t rank) {
  Tensors out;
  for (const auto& [name, tensor] : tensors) {
    const auto found = trained.find(name);
    const auto side = found == trained.end() ? std::nullopt : found->second.traits.ranks_at;
    out[name] = side && tensor.size(*side) > rank ? tensor.narrow(*side, 0, rank).contiguous() : tensor;
  }
  return out;
}

uint64_t seed_of(const GlobalAdapter& global) {
  return core::derive_seed(static_cast<uint64_t>(global.seed), "adapter");
}

adapters::Adapter adapter_after(const GlobalAdapter& global, int64_t rank, std::span<const core::ArtefactPtr> known,
                                const models::Backbone& model, at::Device device) {
  const at::NoGradGuard no_grad;
  uint64_t seed = seed_of(global);
  Tensors values;
  for (const auto& artefact : known) {
    for (auto& [name, tensor] : adapter_tensors(artefact)) values[name] = tensor;
    seed = artefact->meta().value("seed", seed);
  }
  auto adapter = adapters::Adapter::blank(at_rank(global.lora, rank), model, seed, device);
  const Tensors wanted = tensors_of(adapter);
  if (std::ranges::any_of(wanted, [&](const auto& entry) { return !values.contains(entry.first); }))
    values.merge(
        tensors_of(adapters::Adapter::create(at_rank(global.lora, global.rank), model.slots(), seed, at::kCPU)));
  if (rank != global.rank) values = cut(values, adapter.trained(), rank);
  for_values(adapter, values, [](at::Tensor& own, const at::Tensor& value) { own.copy_(value); });
  return adapter;
}

Changes changes_of(const adapters::AdapterConfig& config, uint64_t seed, const Tensors& values,
                   const models::Backbone& model) {
  const at::NoGradGuard no_grad;
  const auto adapter = adapters::Adapter::blank(config, model, seed, at::kCPU);
  for_values(adapter, values, [](at::Tensor& own, const at::Tensor& value) { own.set_data(value); });
  Changes changes;
  for (size_t i = 0; i < adapter.targets().size(); ++i) {
    const std::string& path = adapter.targets()[i].slot.path;
    auto change = adapter.function(i).factored(model.base(path));
    MORAINE_CHECK(change.has_value(), "type {} has no factors at {}", config.type, path);
    changes.emplace(path, std::move(*change));
  }
  return changes;
}

}  // namespace moraine::algorithms::federated
