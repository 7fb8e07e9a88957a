#pragma once

#include <string>

#include "coordinator/run_record.h"

namespace moraine::cli {

/// Id of the artefact of a run that `what` names: a unit's label, an id, the beginning of one (four digits or more), or
/// "mixture" for the merged artefact that RUN/mixture was written from.
/// Throws UserError with the nearest label if there is none, or if several ids begin like that.
std::string find_artefact(const coordinator::RunRecord& run, const std::string& what);

}  // namespace moraine::cli
