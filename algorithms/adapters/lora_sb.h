#pragma once

#include "algorithms/adapters/parametrisation.h"

namespace moraine::algorithms::adapters {

/// LoRA-SB: y = base(x) + (drop(x) A^T) R^T B^T, that is delta W = B R A: LoRA-XS between factors of the first step
/// that full fine-tuning would take.
///
///   D = -rate * sign(G) = U S V^T,   A = V_r^T [r, in],  B = U_r [out, r],  R = diag(S_r)
///
/// G [out, in] is the gradient of the loss by the weight over the first `options.examples` examples of training
/// (algorithms/adapters/calibration.h), D the first step of AdamW, `rate` the learning rate of the first step. B R A is
/// the best approximation of D of rank r, so a fresh adapter is not the base. Trained: R [r, r]; A and B are stored.
///
/// B and A are orthonormal, so the gradient by R is the best image of G of its form and no scale needs tuning: it is 1,
/// as in the authors' code (alpha = r); another `alpha`, its pattern, `init` and `use_rslora` are refused. The singular
/// vectors are exact, theirs come from a randomised decomposition. Sign 0 where G is 0.
/// Source: LoRA-SB (arXiv 2411.19557), section 2; start values as in the authors' code.
const Parametrisation& lora_sb();

}  // namespace moraine::algorithms::adapters
