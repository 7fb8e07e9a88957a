#include "algorithms/adapters/parametrisation.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty_like.h>

#include "core/error.h"
#include "core/hash.h"

namespace moraine::algorithms::adapters {

core::Json Parametrisation::peft_config(const AdapterConfig&) const {
  throw core::UserError(fmt::format("algorithms/adapters: PEFT knows no adapter of type {}", name()),
                        "export the merged model instead");
}

core::Json option_of(const AdapterConfig& config, const char* name) {
  if (config.options.contains(name)) return config.options.at(name);
  return parametrisation(config.type).options().at(name);
}

at::Generator generator_for(const SlotInit& init, const std::string& purpose) {
  return at::detail::createCPUGenerator(core::derive_seed(init.seed, init.target.slot.path + purpose));
}

at::Tensor leaf(const at::Tensor& values, at::Device device) {
  return values.detach().to(device).set_requires_grad(true);
}

at::Tensor dropped(const at::Tensor& x, double share, const models::Pass& pass, const std::string& path) {
  if (share == 0 || !pass.training) return x;
  const auto generator = at::detail::createCPUGenerator(
      core::derive_seed(pass.seed, fmt::format("dropout/{}/{}/{}", path, pass.step, pass.first)));
  const at::Tensor kept = at::empty_like(x, x.options().device(at::kCPU)).bernoulli_(1 - share, generator);
  return x * (kept / (1 - share)).to(x.device());
}

}  // namespace moraine::algorithms::adapters
