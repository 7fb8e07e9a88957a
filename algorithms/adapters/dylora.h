#pragma once

#include "algorithms/adapters/parametrisation.h"

namespace moraine::algorithms::adapters {

/// DyLoRA: one LoRA of rank R of which every first b ranks work. In training
///
///   y = base(x) + (alpha / b) (drop(x) A[:b]^T) B[:, :b]^T,   b uniform in [min_rank, R];
///
/// evaluation, merging and export use all R ranks; Adapter::truncated() gives the others. Shapes: A [R, in],
/// B [out, R]. Trained: A and B; what lies behind b receives a gradient of zero, and with `frozen` what lies before the
/// b-th row of A and column of B does too. Optimisers with momentum or weight decay move those ranks all the same, as
/// in the authors' code. With use_rslora the factor is alpha / sqrt(b) (inferred).
///
/// Options: min_rank (1); frozen (true, as in the authors' scripts). All slots of a step, its micro-batches included,
/// use one b, drawn from the pass's seed and step alone, so data-parallel workers agree. Hence no rank_pattern.
/// Source: DyLoRA (arXiv 2210.07558), section 3 and algorithm 1; huawei-noah/Efficient-NLP, loralib.
const Parametrisation& dylora();

/// The rank of a step's forward passes, uniform in [min_rank, max_rank].
int64_t dylora_rank(const models::Pass& pass, int64_t min_rank, int64_t max_rank);

/// Nested ranks are the same in all slots, and start at B = 0: what else a configuration says is a problem.
std::optional<std::string> nested_problem(const AdapterConfig& config);

}  // namespace moraine::algorithms::adapters
