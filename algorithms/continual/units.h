#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "algorithms/adapters/config.h"
#include "algorithms/continual/examples.h"
#include "core/config.h"
#include "core/json.h"

namespace moraine::algorithms::continual {

// What the units of a run do: one struct per kind, written by the walk and read where the unit runs. Those of the run
// itself stand here, those of learners beside what executes them.

/// The stream that a unit belongs to.
struct StreamSpec {
  int64_t order = -1;
  std::string hash = {};
  core::Json draw = {};  // data::TaskStreamSpec: what a worker draws does not depend on its own recipe
  static const core::Schema<StreamSpec>& schema();
};

/// What every unit says, and its place on a worker follows from.
struct SiteSpec {
  std::string method = "continual";
  int64_t version = 1;  // of what units of this kind give for the same specification
  core::Json compute = {};
  std::optional<ImagesSpec> images = {};  // one of images and texts; neither where artefacts alone are read
  std::optional<TextsSpec> texts = {};
  std::string backbone = {};     // "dir:<hash>", "random:<seed>" or an artefact, which is the unit's last input then
  core::Json architecture = {};  // of a random one
  std::optional<StreamSpec> stream = {};  // of units that belong to an order
  static const core::Schema<SiteSpec>& schema();
  /// That part of any unit's specification.
  static SiteSpec of(const core::Json& spec);
};

/// Adds the fields of SiteSpec to the table of a specification that derives from it.
template <typename C>
void add_site_fields(core::Schema<C>& schema) {
  schema.template field<std::string>("method", &C::method)
      .choices({"continual"})
      .template field<int64_t>("version", &C::version)
      .template field<core::Json>("compute", &C::compute)
      .joined_later()
      .template optional_object<ImagesSpec>("images", &C::images, ImagesSpec::schema())
      .joined_later()
      .template optional_object<TextsSpec>("texts", &C::texts, TextsSpec::schema())
      .joined_later()
      .template field<std::string>("backbone", &C::backbone)
      .joined_later()
      .template field<core::Json>("architecture", &C::architecture)
      .joined_later()
      .template optional_object<StreamSpec>("stream", &C::stream, StreamSpec::schema())
      .joined_later();
}

/// Trains the backbone with the labels of other images.
struct BackboneSpec : SiteSpec {
  static constexpr const char* kKind = "train_backbone";
  static constexpr int64_t kVersion = 1;
  std::string data = {};  // fingerprint
  core::Json train = {};  // train_identity()
  uint64_t seed = 0;
  static const core::Schema<BackboneSpec>& schema();
};

/// Scores the test examples of every task with one state. Inputs: the state's artefacts.
struct EvaluateSpec : SiteSpec {
  static constexpr const char* kKind = "evaluate";
  static constexpr int64_t kVersion = 1;
  std::string state = {};  // Learner::state_kind(): what reads it
  int64_t parts = 0;       // artefacts of it
  int64_t after = 0;       // task; -1 = before the first
  bool ahead = true;       // tasks to come, too
  int64_t batch_size = 1;
  std::optional<uint64_t> head_seed = {};            // of rows that were never trained
  std::optional<adapters::AdapterConfig> lora = {};  // of states that hold an adapter
  std::optional<uint64_t> lora_seed = {};            // of an adapter that a seed regenerates in part
  static const core::Schema<EvaluateSpec>& schema();
};

/// Puts the accuracies of all evaluations together.
struct MatricesSpec : SiteSpec {
  static constexpr const char* kKind = "matrices";
  static constexpr int64_t kVersion = 1;
  core::Json tracks = {};  // [{name, rows: [place in the inputs or null]}]
  static const core::Schema<MatricesSpec>& schema();
};

}  // namespace moraine::algorithms::continual
