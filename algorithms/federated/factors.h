#pragma once

#include <span>
#include <string>
#include <string_view>

#include "algorithms/adapters/adapter.h"
#include "algorithms/federated/federation.h"
#include "algorithms/federated/units.h"
#include "core/artefact.h"
#include "models/slot.h"

namespace moraine::algorithms::federated {

/// An adapter's own tensors, not copies.
Factors live(const adapters::Adapter& adapter);

/// The tensors of an artefact whose names contain `part`, over its bytes.
Factors read_factors(const core::ArtefactPtr& artefact, std::string_view part);

/// What a state holds of the global adapter, without the server's moments.
Factors read_adapter(const core::ArtefactPtr& state);

/// The values that the global adapter starts from: pure in its seed.
Factors first_factors(const GlobalAdapter& global, std::span<const models::Slot> slots);

/// The global adapter after a state: what was not sent has the seed's values at that state's rank.
Factors factors_after(const core::ArtefactPtr& state, const GlobalAdapter& global, std::span<const models::Slot> slots);

/// Replaces an adapter's values. Throws InternalError unless both have the same names and shapes.
void set_factors(const adapters::Adapter& adapter, const Factors& factors);

/// "lora_A.weight" or "lora_B.weight" of a factor's name.
std::string factor_of(const std::string& name);

}  // namespace moraine::algorithms::federated
