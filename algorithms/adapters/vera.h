#pragma once

#include "algorithms/adapters/parametrisation.h"

namespace moraine::algorithms::adapters {

/// VeRA: y = base(x) + b * (B (d * (A drop(x)))), that is delta W = diag(b) B diag(d) A.
///
/// All slots share the random, frozen A [r, max in] and B [max out, r], of which a slot uses the first `in` columns and
/// the first `out` rows. Trained: b [out], starting at 0, and d [r], starting at d_initial. r may exceed a slot's
/// sides. A ~ U(+-sqrt(6 / max in)) and B ~ U(+-sqrt(6 / r)) are drawn in this order by one CPU generator seeded with
/// projection_prng_key, as PEFT 0.21 draws them: neither a recipe's seed nor the slot decides, and an adapter's file
/// need not hold them. With save_projection they are stored (what a file of PEFT holds may have been drawn elsewhere).
/// alpha, init, use_rslora, patterns and exclusions mean nothing to PEFT's VeRA and are refused.
/// Source: VeRA (arXiv 2310.11454), equation 2; draws and file format are PEFT 0.21's.
const Parametrisation& vera();

}  // namespace moraine::algorithms::adapters
