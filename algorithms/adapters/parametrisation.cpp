#include "algorithms/adapters/parametrisation.h"

#include <set>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty_like.h>
#include <fmt/ranges.h>

#include "core/error.h"
#include "core/hash.h"

namespace moraine::algorithms::adapters {

TensorTraits Parametrisation::tensor_traits(std::string_view) const {
  return {.averages_exactly = traits().averages_exactly};
}

core::Json Parametrisation::peft_config(const AdapterConfig&) const {
  throw core::UserError(fmt::format("algorithms/adapters: PEFT knows no adapter of type {}", name()),
                        "export the merged model instead");
}

AdapterConfig Parametrisation::config_from_peft(const core::OrderedJson&, const std::string& origin) const {
  throw core::InternalError(fmt::format("{}: type {} has a peft_type and reads no file of it", origin, name()));
}

AdapterConfig config_from_peft(const core::OrderedJson& json, const std::string& origin) {
  const core::Json given = json.is_object() ? core::Json(json).value("peft_type", core::Json()) : core::Json();
  std::set<std::string> known;
  for (const Parametrisation* type : parametrisations()) {
    if (type->peft_type().empty()) continue;
    if (given == type->peft_type()) return type->config_from_peft(json, origin);
    known.insert(type->peft_type());
  }
  throw core::UserError(fmt::format("algorithms/adapters: {}: peft_type is {}", origin, given.dump()),
                        fmt::format("types that can be read: {}", fmt::join(known, ", ")));
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
