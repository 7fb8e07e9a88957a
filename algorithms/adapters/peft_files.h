#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "algorithms/adapters/config.h"
#include "core/artefact.h"
#include "core/json.h"
#include "core/ordered_json.h"
#include "core/safetensors.h"

namespace moraine::models {
struct ClassifierForm;
}

namespace moraine::algorithms::adapters {

/// Writes a PEFT directory: adapter_config.json (sorted keys, indent 2; patterns in the order of `config`, in which
/// they are tried) and adapter_model.safetensors (metadata format "pt"), with SHA256SUMS. `peft` holds the fields.
/// Tensors are named as in the file. A non-empty `base_model` is entered as base_model_name_or_path, a directory by its
/// absolute path. Throws IoError.
void write_peft_directory(const std::filesystem::path& directory, core::Json peft, const AdapterConfig& config,
                          const std::vector<core::TensorView>& tensors, const std::string& base_model);

/// The file's name of "<slot path>.lora_A.weight" and its like, and of what all slots share.
std::string peft_name(const std::string& name);
std::string peft_shared_name(const std::string& name);

/// A PEFT directory as it lies there, without a model.
struct PeftDirectory {
  core::OrderedJson json;                         // adapter_config.json, with all its fields
  AdapterConfig config;                           // of our slot paths; names its targets always
  core::Safetensors file;                         // adapter_model.safetensors
  std::string text;                               // of adapter_config.json
  std::string prefix = {};                        // of our slot paths in the file's names, behind PEFT's own: "bert."
  std::vector<core::TensorView> classifier = {};  // tensors of `file` of a classifier that was trained beside

  /// SHA-256 of both files.
  std::string hash() const;
};

/// Reads one. With a `classifier`, the form in which the model's family has one, an adapter of the model with that
/// classifier is read, too: its module may stand in modules_to_save, and what the file says of modules is brought to
/// the paths of the model without it. Without, such an adapter is refused. Throws UserError as config_from_peft(), if a
/// file differs from the SHA256SUMS beside it, and on other modules to save.
PeftDirectory read_peft_directory(const std::filesystem::path& directory,
                                  const models::ClassifierForm* classifier = nullptr);

/// An artefact that is a LoRA (kinds "adapter" and "update", docs/formats.md) as a PEFT directory: its metadata hold
/// adapter_config.json under "peft", or a AdapterConfig under "lora". A server optimiser's moments are left behind.
/// Throws UserError on metadata with neither, on types other than plain LoRA and rsLoRA, and on tensors other than
/// pairs A and B, such as a change of the base.
void export_adapter(const core::Artefact& adapter, const std::filesystem::path& directory,
                    const std::string& base_model);

/// A PEFT directory as an artefact of kind "adapter"; export_adapter() writes it back with the same tensor bytes and
/// the same configuration, unknown fields included. Checked without the base model: peft_type and options
/// (config_from_peft), that every tensor is a factor of a pair, that the configuration selects every module that
/// has factors, and their ranks. Throws one UserError that lists every tensor that does not fit.
core::ArtefactPtr import_adapter(const std::filesystem::path& directory);

}  // namespace moraine::algorithms::adapters
