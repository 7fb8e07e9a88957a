#pragma once

#include "algorithms/adapters/parametrisation.h"

namespace moraine::algorithms::adapters {

/// Compacter's layer, as a change of one linear map: a sum of n Kronecker products whose small factors all slots share.
///
///   y = base(x) + drop(x) H,   H = sum over i = 1 .. n of A_i (x) (s_i t_i^T)   [in, out]
///
/// Shapes: A [n, n, n], once for the model; s [n, in / n], t [n, out / n]. Trained: all of them, n^3 + sum of (in +
/// out) numbers whatever n. A starts at N(0, 1e-4^2), s and t Glorot-uniform with gain sqrt(2), so a fresh adapter
/// changes the output a little. H is never built: a row costs n (in + n^2 + out) multiplications.
///
/// Taken alone like that, without a bias, it can be merged (inferred). With `form: adapter` two of these layers stand
/// where the paper puts them, on the output of a sub-layer, before the residual stream takes it:
///
///   y = base(x),   y <- y + gelu(drop(y) H_down + b_down) H_up + b_up
///
/// Shapes: H_down [out, d], H_up [d, out], d = out / reduction; biases, from 0, [d] and [out]: 3 (out + d) numbers for
/// a slot. gelu is the tanh form. Its slots are the last linear modules of the sub-layers, which target_modules has to
/// name: [o_proj, down_proj] of a decoder (Compacter; down_proj alone: Compacter++). No change of weights: it cannot be
/// merged. Norms, which the paper trains beside, stay frozen.
///
/// Options: n (4), which has to divide in and out, or out and d; form (linear | adapter); reduction (32), of adapter.
/// Source: Compacter (arXiv 2106.04647), equations 4 to 6; rabeehk/compacter, seq2seq/hypercomplex.
const Parametrisation& compacter();

}  // namespace moraine::algorithms::adapters
