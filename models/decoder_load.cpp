#include <memory>

#include <fmt/ranges.h>

#include "core/error.h"
#include "core/json.h"
#include "models/checkpoint.h"
#include "models/decoder.h"
#include "models/olmo_core.h"
#include "models/weights.h"

namespace moraine::models {

Decoder Decoder::from_config(const DecoderConfig& config, uint64_t seed, at::ScalarType dtype) {
  if (const std::vector<std::string> wrong = config.problems(); !wrong.empty()) {
    throw core::UserError(fmt::format("models: cannot build a model of this config:\n  {}", fmt::join(wrong, "\n  ")));
  }
  return Decoder(config, random_weights(expected_tensors(config), seed, config.initializer_range, dtype));
}

Decoder Decoder::from_directory(const std::filesystem::path& directory, std::optional<at::ScalarType> dtype) {
  const DecoderConfig config = DecoderConfig::from_directory(directory);
  const auto files = std::make_shared<const core::ShardedSafetensors>(core::ShardedSafetensors::open(directory));
  return from_tensors(config, files->tensors(), directory.string(), dtype, files);
}

Decoder Decoder::from_tensors(const DecoderConfig& config, const std::vector<core::TensorView>& tensors,
                              const std::string& origin, std::optional<at::ScalarType> dtype,
                              const std::shared_ptr<const void>& owner) {
  const bool layouts =
      config.family == DecoderConfig::Family::kFlexOlmo || config.family == DecoderConfig::Family::kOlmo2;
  OwnedViews named = layouts ? hugging_face_layout(tensors, owner, origin) : OwnedViews{tensors, owner};
  named.tensors = without_redundant(std::move(named.tensors), config, origin);
  require_plausible_layers(config.num_layers, config.num_experts, named.tensors.size(), origin);
  return Decoder(config, match_weights(expected_tensors(config), named.tensors, origin, dtype, named.owner));
}

Decoder Decoder::on(at::Device device) const { return Decoder(config_, frozen_weights(device)); }

std::unique_ptr<Backbone> Decoder::with_weights(Weights weights) const {
  return std::unique_ptr<Backbone>(new Decoder(config_, std::move(weights)));
}

Decoder Decoder::plus(const NamedTensors& deltas) const { return Decoder(config_, weights_plus(deltas)); }

}  // namespace moraine::models
