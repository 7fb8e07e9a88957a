#pragma once

#include "algorithms/register.h"

namespace moraine::algorithms::ffa_lora {

/// FFA-LoRA: A is random, shared and never trained; B is trained, sent and averaged. Exact, because the mean of B_k A_0
/// is Bbar A_0, and half the bytes of FedIT: r * out numbers per matrix and direction; A_0 follows from the seed.
/// Of other types with factors the tensors that average exactly are trained (inferred).
/// Source: FFA-LoRA (arXiv 2403.12313), section 4. The paper's SGD with a folded alpha is `train.optimizer: sgd`.
MethodEntry method_entry();

}  // namespace moraine::algorithms::ffa_lora
