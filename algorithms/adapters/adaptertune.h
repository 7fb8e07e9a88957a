#pragma once

#include "algorithms/adapters/parametrisation.h"

namespace moraine::algorithms::adapters {

/// AdapterTune: a GELU bottleneck on the residual stream behind a frozen block.
///
///   h <- h + scale * (GELU(h D^T + b_D) U^T + b_U)        h: the block's output, all tokens
///
/// Shapes: D [r, d], b_D [r], U [d, r], b_U [d]. Trained: all of them, 2 d r + r + d numbers for each adapted block. D
/// starts Xavier-uniform, U and the biases at 0, so a fresh adapter changes nothing; `init: small` draws U and b_U from
/// N(0, 1e-4^2). The GELU is the exact one; there is no norm and no dropout inside.
///
/// Options: scale (1), not divided by the rank; every (1): blocks 0, every, 2 every, ...; init (zero | small). Sits on
/// block slots, so target_modules names layers ("model.layers.3"), all-linear stands for all. Not a change of weights:
/// it cannot be merged.
/// Source: AdapterTune (arXiv 2603.14706); salimkhazem/adaptertune, src/models/adapters.py. On decoders and text
/// encoders, which the paper does not treat, it sits at the same place (inferred).
const Parametrisation& adaptertune();

}  // namespace moraine::algorithms::adapters
