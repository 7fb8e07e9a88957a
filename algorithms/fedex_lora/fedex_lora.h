#pragma once

#include "algorithms/register.h"

namespace moraine::algorithms::fedex_lora {

/// FedEx-LoRA: factors are averaged as in FedIT, and what averaging loses is added to the base of the server and of
/// every client, so that the global model is exact:
///   W0 <- W0 + s (sum_k p_k B_k A_k - Bbar Abar) = W0 + s sum_k p_k (B_k - Bbar)(A_k - Abar).
/// Up: r (in + out) numbers per matrix; down: the same plus the residual's factors, K r (in + out) (its rank is at most
/// (K - 1) r). Of other types with factors, which are affine in what is trained, the same (inferred).
/// Source: FedEx-LoRA (arXiv 2410.09432), equation 8, with the weights p_k in place of 1 / K; `weighting:
/// uniform` is the paper's. The factored form of the residual is our algebra.
MethodEntry method_entry();

}  // namespace moraine::algorithms::fedex_lora
