#include "algorithms/federated/factors.h"

#include <ATen/core/grad_mode.h>

#include "core/error.h"
#include "core/hash.h"
#include "models/tensor_io.h"

namespace moraine::algorithms::federated {

Factors live(const adapters::Adapter& adapter) {
  const models::NamedTensors parameters = adapter.parameters();
  return {parameters.begin(), parameters.end()};
}

Factors read_factors(const core::ArtefactPtr& artefact, std::string_view part) {
  Factors out;
  for (const auto& view : artefact->file().tensors())
    if (view.name.find(part) != std::string::npos) out[view.name] = models::borrow(view, artefact);
  return out;
}

Factors read_adapter(const core::ArtefactPtr& state) {
  Factors out = read_factors(state, ".lora_");
  std::erase_if(out, [](const auto& entry) { return entry.first.starts_with("m.") || entry.first.starts_with("v."); });
  return out;
}

Factors first_factors(const GlobalAdapter& global, std::span<const models::Slot> slots) {
  return live(adapters::Adapter::create(at_rank(global.lora, global.rank), slots,
                                        core::derive_seed(static_cast<uint64_t>(global.seed), "adapter"), at::kCPU));
}

Factors factors_after(const core::ArtefactPtr& state, const GlobalAdapter& global,
                      std::span<const models::Slot> slots) {
  const at::NoGradGuard no_grad;
  Factors factors = cut(first_factors(global, slots), state->meta().at("rank").get<int64_t>());
  for (auto& [name, tensor] : read_adapter(state)) factors[name] = tensor;
  return factors;
}

void set_factors(const adapters::Adapter& adapter, const Factors& factors) {
  const at::NoGradGuard no_grad;
  for (const auto& [name, parameter] : adapter.parameters()) {
    const auto found = factors.find(name);
    MORAINE_CHECK(found != factors.end() && found->second.sizes() == parameter.sizes(), "factor '{}' does not fit",
                  name);
    parameter.copy_(found->second);
  }
}

std::string factor_of(const std::string& name) { return name.substr(name.rfind("lora_")); }

}  // namespace moraine::algorithms::federated
