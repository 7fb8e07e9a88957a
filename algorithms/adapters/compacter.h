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
/// The paper puts two of these layers with a non-linearity between behind a sub-layer and trains biases and norms
/// beside; taken alone, without a bias, it can be merged (inferred). Options: n (4), which has to divide in and out.
/// Source: Compacter (arXiv 2106.04647), equations 4 and 5; rabeehk/compacter, seq2seq/hypercomplex.
const Parametrisation& compacter();

}  // namespace moraine::algorithms::adapters
