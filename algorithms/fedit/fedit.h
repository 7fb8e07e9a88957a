#pragma once

#include "algorithms/register.h"

namespace moraine::algorithms::fedit {

/// FedIT: federated averaging of an adapter, every trained tensor by itself. Of a LoRA A and B, r (in + out) numbers
/// per matrix and direction; not exact: mean(B) mean(A) differs from mean(B A) by sum_k p_k (B_k - Bbar)(A_k - Abar).
/// Other types alike (inferred); exact where all tensors average exactly (adapters::Traits). Source: FedIT (arXiv
/// 2305.05644).
MethodEntry method_entry();

}  // namespace moraine::algorithms::fedit
