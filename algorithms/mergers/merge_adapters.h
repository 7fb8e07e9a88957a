#pragma once

#include <filesystem>
#include <map>
#include <span>
#include <string>

#include "algorithms/adapters/adapter.h"
#include "algorithms/mergers/merger.h"
#include "models/backbone.h"

namespace moraine::algorithms::mergers {

/// One of several adapters of the same base model, of any type that is a change of weights.
struct Participant {
  std::string name;      // for messages
  std::string identity;  // Contribution::identity: of the adapter's content, so that its name and place do not matter
  double weight = 1;
  const adapters::Adapter* adapter = nullptr;
};

/// What came out, by the path of the slot; a changed bias, an [out, 1] matrix, by the path and ".bias".
using MergedSlots = std::map<std::string, Merged>;

/// Slot by slot; a slot that some adapters leave alone is merged from the others (as PEFT does it). Throws UserError as
/// Merger::merge(), and naming an adapter that is no change of weights.
MergedSlots merge_adapters(std::span<const Participant> participants, const models::Backbone& base,
                           const MergeConfig& config);

/// Changes of weights under the weights' names, sorted, as Backbone::changed_by takes them.
models::NamedTensors changes_of(const MergedSlots& merged);

/// Writes a plain LoRA with alpha = rank as a PEFT directory, float32. Throws UserError where a change has no factors,
/// more ranks than its matrix, or is a bias's.
void write_peft(const MergedSlots& merged, const models::Backbone& base, const std::filesystem::path& directory,
                const std::string& base_model);

}  // namespace moraine::algorithms::mergers
