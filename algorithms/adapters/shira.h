#pragma once

#include "algorithms/adapters/parametrisation.h"

namespace moraine::algorithms::adapters {

/// SHiRA: some entries of the weight are trained, all others stay.
///
///   y = base(x) + drop(x) S^T,   S[row_e, column_e] = v_e,   zero elsewhere
///
/// Shapes: v [K], indices [2, K] (row; column) in row-major order, S [out, in]. Trained: v, from 0. K is
/// rank * (in + out), as many numbers as LoRA of that rank has (as PEFT counts), or density * in * out; both per slot.
///
/// Options: mask, which entries, and density (0: K by the rank).
///   rand    K at random, from the seed: not stored
///   wm      the K largest |W|, the first of equal ones: stored as state, int32
///   struct  every f-th row and the main diagonal, f = in * out / K rounded: follows from the shape, not stored
/// The paper's masks by gradients (grad, SNIP) are not here. There is no scale and no rank: alpha, its patterns, init
/// and use_rslora are refused. PEFT knows the type with a rank, the same in all slots, for masks rand and wm. Source:
/// SHiRA (arXiv 2406.13175), section 3; names and counts are PEFT 0.21's.
const Parametrisation& shira();

}  // namespace moraine::algorithms::adapters
