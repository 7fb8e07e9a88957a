#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "algorithms/adapters/adapter.h"
#include "algorithms/adapters/config.h"
#include "algorithms/adapters/parametrisation.h"
#include "algorithms/flexmore/config.h"
#include "models/decoder.h"
#include "models/mixture.h"

namespace moraine::algorithms::flexmore {

// Direct experts with an `adapter`: one of algorithms/adapters on the three matrices of every FFN, trained beside the
// public expert. A change of factors becomes a low-rank expert, whose factors have the adapter's scale in them; a dense
// change becomes a full-size expert, which is exact, and is then cut as any other.

/// The adapter with the matrices of an expert as its targets.
adapters::AdapterConfig on_ffn(adapters::AdapterConfig config);

/// Why an adapter cannot make an expert: its change is none of weights, or it asks for other modules or several ranks.
std::optional<std::string> expert_problem(const adapters::AdapterConfig& config);

/// Numbers of the adapter on that public model. Throws UserError as targets_of().
adapters::Counts adapter_counts(const adapters::AdapterConfig& config, const models::DecoderConfig& public_model);

/// Whether the domain's expert is trained as factors, so that there is no full-size one.
bool trains_factors(const DomainConfig& domain);
/// Rank of the domain's expert as it is trained; 0 = full-size.
int64_t trained_rank(const DomainConfig& domain);
/// Whether the rank in the mixture is chosen on validation text: `auto` where the expert can be cut well, which is
/// full-size ones and nested adapters.
bool chooses_rank(const DomainConfig& domain);
/// The rank in the mixture where it is not chosen; 0 = full-size.
int64_t fixed_rank(const DomainConfig& domain);
/// What a unit is told that uses the trained or extracted expert at a rank: 0 = as it was trained.
int64_t cut_to(const DomainConfig& domain, int64_t rank);
/// Of `ranks` those the expert can be cut to.
std::vector<int64_t> ranks_within(const DomainConfig& domain, const std::vector<int64_t>& ranks);

/// Experts of which the adapter's functions stand on the public matrices, per layer, for training.
std::vector<models::FfnExpert> adapted_layers(const adapters::Adapter& adapter, const models::Decoder& model);

/// What the adapter makes of the public FFNs, per layer, float32 on the CPU: pairs of factors with the scale in B, of
/// rank factored_rank(), or full-size matrices W + delta where the change is dense.
std::vector<models::FfnExpert> expert_layers(const adapters::Adapter& adapter, const models::Decoder& model);

/// What the first k ranks of a nested adapter are multiplied by when they stand alone, relative to all of them, k = 1
/// .. rank: scale of k / scale of rank. Empty for other types, whose pairs keep the strength they were trained with.
std::vector<double> scales_by_rank(const adapters::AdapterConfig& config);

}  // namespace moraine::algorithms::flexmore
