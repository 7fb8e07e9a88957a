#pragma once

#include "algorithms/adapters/parametrisation.h"

namespace moraine::algorithms::adapters {

/// LoRA-XS: y = base(x) + scale * (drop(x) A^T) R^T B^T, that is delta W = scale * B R A.
///
/// A [r, in] = S_r V_r^T and B [out, r] = U_r are the leading singular triplets of the frozen weight W = U S V^T, so
/// R = 1 and scale 1 give its best approximation of rank r. Trained: R [r, r] ~ N(0, 1e-5^2), so a fresh adapter is not
/// exactly zero. A and B are frozen but stored: another machine's decomposition has other bits and signs.
/// `init` means nothing here and is refused.
/// Source: LoRA-XS (arXiv 2405.17604), section 3; start values as in the authors' code.
const Parametrisation& lora_xs();

}  // namespace moraine::algorithms::adapters
