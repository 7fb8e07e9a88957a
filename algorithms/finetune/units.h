#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "algorithms/adapters/config.h"
#include "algorithms/finetune/early_stopping.h"
#include "algorithms/galore/galore.h"
#include "algorithms/objectives/objective.h"
#include "core/config.h"
#include "core/json.h"

namespace moraine::algorithms::finetune {

// Kinds of artefacts.
constexpr const char *kAdapter = "adapter", *kWeights = "weights", *kHead = "head";

/// The model with the weights of a result of that kind, or the base as it is; on the base's device.
std::unique_ptr<models::Backbone> fitted(const models::Backbone& base, const core::ArtefactPtr& result);

// What the units of a run do: one struct per kind, written by plan() and read by execute().

/// Fits the model to one task. Gives an artefact of kind "adapter", "weights" or "head"; the first two hold the task's
/// head too, where it needs one.
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
  bool head_only = false;
  objectives::DataSpec data = {};
  std::optional<EarlyStoppingConfig> early_stopping = {};
  std::optional<objectives::DataSpec> validation = {};  // of early_stopping
  uint64_t adapter_seed = 0;                            // start values, of the head too
  uint64_t data_seed = 0;                               // order of the data, and what is drawn in passes
  core::Json train = {};                                // train_identity()
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
  objectives::DataSpec data = {};
  int64_t sequences = 0;
  int64_t batch_size = 1;
  int64_t rank = 0;  // to which the adapter is cut; 0 = as it is
  static const core::Schema<EvaluateSpec>& schema();
};

}  // namespace moraine::algorithms::finetune
