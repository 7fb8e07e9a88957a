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
///   grad    the K largest |G|, stored alike; G [out, in] is the gradient of the mean loss by the weight over the first
///           `examples` (64) examples of training (calibration.h)
///   snip    the K largest |W * G|, entry by entry, stored alike
///   struct  every f-th row and the main diagonal, f = in * out / K rounded: follows from the shape, not stored
/// There is no scale and no rank: alpha, its patterns, init and use_rslora are refused. PEFT knows the type with a
/// rank, the same in all slots, for all masks but struct. Source: SHiRA (arXiv 2406.13175), section 3; how many
/// examples a gradient is taken over is ours (inferred); names and counts are PEFT 0.21's.
const Parametrisation& shira();

}  // namespace moraine::algorithms::adapters
