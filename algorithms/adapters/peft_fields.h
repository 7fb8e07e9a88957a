#pragma once

#include <functional>
#include <set>
#include <string>

#include "algorithms/adapters/config.h"
#include "core/json.h"
#include "core/ordered_json.h"

namespace moraine::algorithms::adapters {

// adapter_config.json of Hugging Face PEFT 0.21: what its types have in common.

/// The fields of one type.
struct PeftFields {
  core::Json defaults;         // PEFT's, of all its fields
  std::set<std::string> read;  // taken over, or without influence on what a trained adapter computes
};
/// Both from JSON text, with what PEFT writes for every type added: `defaults` an object, `read` a list.
PeftFields peft_fields(const char* peft_type, const char* defaults, const char* read);

/// Enters target_modules, exclude_modules and layers_to_transform.
void write_targets(const AdapterConfig& config, core::Json& json);

/// Reads a file: the targets, then what `read_rest` takes from its values, missing ones by their defaults. Throws
/// UserError on a field of the wrong type and on one that PEFT knows, that is on and not in `fields.read`; fields that
/// PEFT does not know are named in a warning.
AdapterConfig read_peft(const core::OrderedJson& json, const PeftFields& fields, const std::string& origin,
                        const std::function<void(const core::Json& values, AdapterConfig& config)>& read_rest);

/// A whole number, which JSON may write as a real one. Throws UserError otherwise.
int64_t whole_number(const core::Json& value);

}  // namespace moraine::algorithms::adapters
