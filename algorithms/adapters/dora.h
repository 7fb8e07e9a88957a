#pragma once

#include "algorithms/adapters/parametrisation.h"

namespace moraine::algorithms::adapters {

/// DoRA: y = base(x) + (m / n - 1) * (base(x) - bias) + (m / n) * s B A drop(x), with n the norms of the rows of
/// W + s B A, which receive no gradient. Trained: A, B and the magnitudes m [out], which start at the norms of W's
/// rows. Source: DoRA (arXiv 2402.09353), section 4.3; the order of operations is PEFT 0.21's.
const Parametrisation& dora();

}  // namespace moraine::algorithms::adapters
