#pragma once

#include "algorithms/register.h"

namespace moraine::algorithms::fedit {

/// FedIT: federated averaging of LoRA factors, A and B each by itself. Trained and sent: A and B, r (in + out) numbers
/// per matrix and direction. Not exact: mean(B) mean(A) differs from mean(B A) by sum_k p_k (B_k - Bbar)(A_k - Abar).
/// Source: FedIT (arXiv 2305.05644).
MethodEntry method_entry();

}  // namespace moraine::algorithms::fedit
