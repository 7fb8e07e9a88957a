#pragma once

#include <optional>
#include <string>

#include "core/artefact.h"

namespace moraine::coordinator {

/// The first NaN or infinity of an artefact as "tensor 'name' element 17 is nan", nullopt if all its numbers are
/// finite. Nothing non-finite is ever accepted: it would spread through every merge. Reads each byte once.
std::optional<std::string> first_non_finite(const core::Artefact& artefact);

}  // namespace moraine::coordinator
