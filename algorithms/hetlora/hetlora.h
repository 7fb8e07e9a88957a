#pragma once

#include "algorithms/register.h"

namespace moraine::algorithms::hetlora {

/// HetLoRA: clients of different ranks. The server sends the first r_k directions of the global factors; a client adds
///   lambda sum_slots ||B[:, q:]||_F ||A[q:, :]||_F,  q = floor(gamma r_k),
/// to its loss and cuts its rank to q when that product shrank during the round; the server pads with zeros and weighs
/// by S_k = ||B_k A_k||_F over all slots, p_k = S_k / sum S. Up and down: r_k (in + out) numbers per matrix. Not exact,
/// and directions that only high ranks train are diluted by the others' zeros. When every S_k is zero (nobody learned
/// anything) weights are equal. `clients.weighting` plays no part. Source: HetLoRA (arXiv 2401.06432) by way of two
/// reimplementations; there is no official code (inferred where they differ: the tail product is summed over slots
/// before it is compared).
MethodEntry method_entry();

}  // namespace moraine::algorithms::hetlora
