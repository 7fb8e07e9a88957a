#pragma once

#include "algorithms/register.h"

namespace moraine::algorithms::flora {

/// FLoRA: clients start every round from fresh factors of their own rank; the server stacks what comes back,
///   A = [p_1 s A_1; ...; p_K s A_K],  B = [B_1, ..., B_K],   B A = s sum_k p_k B_k A_k exactly,
/// and everybody adds B A to the base. Up: r_k (in + out) numbers per matrix; down: R (in + out), R = sum of the ranks.
/// Of other types with factors these are stacked, every part of them (inferred); of one that starts from the base the
/// fresh start is taken from the base as the rounds have changed it.
/// Source: FLoRA (arXiv 2409.05976), equation 5; weights on A only, as there. Fresh A per client and round (its code
/// draws A anew); optimiser state never outlives a round.
MethodEntry method_entry();

}  // namespace moraine::algorithms::flora
