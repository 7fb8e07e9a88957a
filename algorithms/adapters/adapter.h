#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "algorithms/adapters/calibration.h"
#include "algorithms/adapters/config.h"
#include "algorithms/adapters/parametrisation.h"
#include "algorithms/adapters/peft_files.h"
#include "algorithms/worker_context.h"
#include "core/artefact.h"
#include "models/backbone.h"

namespace moraine::algorithms::adapters {

/// A classifier that PEFT keeps beside an adapter (modules_to_save), in the form of the whole model.
struct PeftClassifier {
  models::NamedTensors tensors;  // "classifier.weight", ...; empty = none
  std::string module;            // "classifier"
  std::string prefix;            // of the backbone in the model with a classifier: "bert."
  std::string task_type;         // "SEQ_CLS"; "" = null
};

/// A trained tensor of an adapter of a whole model.
struct TrainedTensor {
  std::string slot;  // its path; "" of what all slots share
  TensorTraits traits;
};
using TrainedTensors = std::map<std::string, TrainedTensor>;  // by the names of Adapter::parameters()

/// An adapter of a whole model: one SlotAdapter for every selected slot. Trained: what its parametrisation says;
/// frozen: everything else. Not thread-safe.
class Adapter {
 public:
  /// A fresh one, float32 on `device`. What a slot starts with depends on `seed`, its path and, where
  /// Traits::reads_base, the frozen weight. Throws UserError as targets_of().
  static Adapter create(const AdapterConfig& config, const models::Backbone& model, uint64_t seed, at::Device device);
  /// The same where what Parametrisation::wants() something of examples starts from those of `calibration`. The forms
  /// without one throw UserError for such a configuration.
  static Adapter create(const AdapterConfig& config, const models::Backbone& model, uint64_t seed, at::Device device,
                        const Calibration& calibration);
  /// The same of shapes alone. InternalError if the parametrisation reads the base.
  static Adapter create(const AdapterConfig& config, std::span<const models::Slot> slots, uint64_t seed,
                        at::Device device);
  /// The same with values yet to come: what is right are the shapes and what `seed` alone gives and nobody stores.
  static Adapter blank(const AdapterConfig& config, const models::Backbone& model, uint64_t seed, at::Device device);
  /// What to_artefact() wrote, for training it further or for using it. Throws UserError naming each tensor that is
  /// missing, left over or of another shape.
  static Adapter from_artefact(const core::Artefact& artefact, const models::Backbone& model, at::Device device);
  /// Reads a PEFT directory: adapter_config.json and adapter_model.safetensors. `dtype` converts; nullopt keeps the
  /// file's. Parameters require gradients. Throws UserError listing every tensor that is missing, left over or of the
  /// wrong shape, if the file differs from the SHA256SUMS beside it, and as config_from_peft().
  static Adapter load(const std::filesystem::path& directory, const models::Backbone& model,
                      std::optional<at::ScalarType> dtype, at::Device device);
  /// The same of a directory that was read; a classifier in it is passed over.
  static Adapter load(const PeftDirectory& read, const models::Backbone& model, std::optional<at::ScalarType> dtype,
                      at::Device device);

  /// Writes a PEFT directory (metadata format "pt", config with sorted keys and indent 2). What load() read is written
  /// back unchanged: every field of the configuration, every tensor byte. A non-empty `base_model` is entered as
  /// base_model_name_or_path. Throws UserError for a type PEFT does not know.
  void save(const std::filesystem::path& directory, const std::string& base_model = "",
            const PeftClassifier& classifier = {}) const;
  /// Artefact of kind "adapter" (docs/formats.md): everything that is trained or kept, under "adapter" the
  /// configuration and under "seed" what create() was given, from which comes what is not stored.
  /// `beside`: a head's tensors, under names that begin with "head.", which from_artefact() passes over.
  core::ArtefactPtr to_artefact(core::Json meta, uint64_t seed, models::NamedTensors beside = {}) const;

  /// Takes over the selected slots of `model`. Throws InternalError if one is taken.
  void attach(models::Backbone& model) const;
  /// Restores the frozen functions.
  void detach(models::Backbone& model) const;

  /// The first `rank` ranks as a plain LoRA, in copies: of a nested type at the scale of that rank, of a plain LoRA at
  /// its own (a control: nothing orders its ranks). UserError unless can_be_truncated(), and for a rank it has not.
  Adapter truncated(int64_t rank, const models::Backbone& model) const;

  const AdapterConfig& config() const { return config_; }
  const std::vector<Target>& targets() const { return targets_; }
  const SlotAdapter& function(size_t target) const { return *functions_[target]; }
  /// "<slot path>.<name>", and "shared.<name>" of what all slots share; sorted by name.
  models::NamedTensors parameters() const;
  TrainedTensors trained() const;
  /// Those that learn at AdapterConfig::lr_ratio times the rate; none when it is 1.
  std::vector<ParameterGroup> groups() const;
  /// What is kept and not trained, named alike.
  models::NamedTensors state() const;
  /// Dense change of every selected weight (and bias), under the weight's name, sorted. Throws UserError when the map
  /// is not a linear one, and when a bias changes that the model does not have.
  models::NamedTensors deltas(const models::Backbone& model) const;

 private:
  Adapter() = default;
  static Adapter make(const AdapterConfig& config, std::vector<Target> targets, const models::Backbone* model,
                      uint64_t seed, at::Device device, bool fresh, const Calibration* calibration = nullptr);
  models::NamedTensors named(models::NamedTensors (SlotAdapter::*of)() const) const;
  /// By their names in a file in PEFT's form: of the slots, and what is kept of the shared ones.
  models::NamedTensors in_peft_file(models::NamedTensors (SlotAdapter::*of)() const) const;

  AdapterConfig config_ = {};
  std::vector<Target> targets_;
  std::vector<std::shared_ptr<SlotAdapter>> functions_;  // parallel to targets_
  std::map<std::string, at::Tensor> shared_;             // of all slots, by name
  core::Json peft_;                                      // adapter_config.json as read, unknown fields included
};

/// Whether Adapter::truncated() takes it: nested types, and plain LoRA of one rank.
bool can_be_truncated(const AdapterConfig& config);
/// Whether its first ranks, cut out, do what they do among the others: not those that MatryoshkaLoRA's `as_trained`
/// weighs by the whole rank.
bool ranks_stand_alone(const AdapterConfig& config);

}  // namespace moraine::algorithms::adapters
