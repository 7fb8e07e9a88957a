#pragma once

#include <filesystem>
#include <string>

#include "core/json.h"
#include "models/slot.h"

namespace moraine::worker {

/// One training job in the middle: tensors and what else the loop carries, in one safetensors file that is replaced
/// atomically (docs/formats.md, "checkpoint"). Metadata key "moraine": {"format": 2, "job": ..., "crc32c": ..., "loop":
/// {...}}.

/// Writes tensors (any device) and `loop`. `job` names what the checkpoint belongs to. Throws IoError.
void save_checkpoint(const std::filesystem::path& path, const std::string& job, const core::Json& loop,
                     const models::NamedTensors& tensors);

/// Fills `tensors` in place and returns `loop`; null (and nothing touched) when there is no usable checkpoint. A file
/// that is torn, damaged, of another job or of other shapes is never trusted: it is ignored with a warning.
core::Json load_checkpoint(const std::filesystem::path& path, const std::string& job,
                           const models::NamedTensors& tensors);

}  // namespace moraine::worker
