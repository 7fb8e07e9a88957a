#pragma once

#include <optional>
#include <span>
#include <string>

#include <c10/core/Device.h>

#include "algorithms/adapters/adapter.h"
#include "algorithms/federated/federation.h"
#include "algorithms/federated/units.h"
#include "core/artefact.h"
#include "models/backbone.h"

namespace moraine::algorithms::federated {

// What artefacts of a federation hold of its adapter, and the adapter made of it. A start, a state and a contribution
// hold tensors by the names of adapters::Adapter::parameters() and state(); a state beside them the server's moments
// and what the round adds to the base, under names of their own.

/// Adapters whose first values follow from the base's weights: made once, by a `start` unit, and sent from there. Those
/// of all others follow from a seed, wherever they are needed.
bool starts_from_weights(const adapters::AdapterConfig& adapter);

/// Of the adapter, over the artefact's bytes.
Tensors adapter_tensors(const core::ArtefactPtr& artefact);
/// "m.<name>", "v.<name>": the server optimiser's.
Tensors server_moments(const core::ArtefactPtr& state);
/// Adds what a state adds to the base, base_B base_A of every slot that has one, by the weights' names.
void add_base_change(const core::ArtefactPtr& state, std::map<std::string, at::Tensor>& changes);

/// An adapter's own tensors, trained and kept, not copies; trained alone.
Tensors tensors_of(const adapters::Adapter& adapter);
Tensors trained_tensors_of(const adapters::Adapter& adapter);

/// The first `rank` ranks of what has ranks; other tensors as they are.
Tensors cut(const Tensors& tensors, const adapters::TrainedTensors& trained, int64_t rank);

/// The seed that first values follow from, and what nobody stores.
uint64_t seed_of(const GlobalAdapter& global);

/// The adapter of `rank` on `model`: the first values, then what each of `known` (a start, a state, a contribution)
/// holds. Throws UserError if a tensor is of another shape.
adapters::Adapter adapter_after(const GlobalAdapter& global, int64_t rank, std::span<const core::ArtefactPtr> known,
                                const models::Backbone& model, at::Device device);

/// The exact change of every slot, by its path, of the adapter of `rank` and `seed` with these values, which it
/// borrows. Throws UserError if a value is missing or of another shape, InternalError if the type gives no factors.
Changes changes_of(const adapters::AdapterConfig& adapter, uint64_t seed, const Tensors& values,
                   const models::Backbone& model);

}  // namespace moraine::algorithms::federated
