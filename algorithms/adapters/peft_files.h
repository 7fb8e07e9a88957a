#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "algorithms/adapters/config.h"
#include "core/artefact.h"
#include "core/json.h"
#include "core/safetensors.h"

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

/// The module paths that have factors in an adapter_model.safetensors.
std::vector<std::string> modules_with_factors(const core::Safetensors& file);

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
