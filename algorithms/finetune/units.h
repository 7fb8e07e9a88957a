#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "algorithms/adapters/config.h"
#include "algorithms/galore/galore.h"
#include "algorithms/language_model.h"
#include "core/config.h"
#include "core/json.h"

namespace moraine::algorithms::finetune {

// What the units of a run do: one struct per kind, written by plan() and read by execute().

/// Fits the model to one task. Gives an artefact of kind "adapter", or "weights" when there is no adapter.
struct TrainSpec {
  static constexpr const char* kKind = "finetune";
  static constexpr int64_t kVersion = 1;
  int64_t version = kVersion;
  int64_t type_version = 1;  // Parametrisation::result_version()
  core::Json compute = {};
  std::string base = {};
  std::optional<adapters::AdapterConfig> adapter = {};
  std::optional<galore::GaLoreConfig> galore = {};
  std::string start = {};  // SHA-256 of the adapter to start from; "" = fresh
  TextSpec data = {};
  uint64_t adapter_seed = 0;  // start values
  uint64_t data_seed = 0;     // order of the data, and what is drawn in passes
  core::Json train = {};      // train_identity()
  static const core::Schema<TrainSpec>& schema();
};

/// Scores the base or a result. Inputs: the result.
struct EvaluateSpec {
  static constexpr const char* kKind = "evaluate";
  static constexpr int64_t kVersion = 1;
  int64_t version = kVersion;
  core::Json compute = {};
  std::string base = {};
  std::string dtype = "float32";
  TextSpec data = {};
  int64_t sequences = 0;
  int64_t batch_size = 1;
  static const core::Schema<EvaluateSpec>& schema();
};

}  // namespace moraine::algorithms::finetune
