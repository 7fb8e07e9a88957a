#pragma once

#include "algorithms/adapters/parametrisation.h"

namespace moraine::algorithms::adapters {

/// BitFit: y = base(x) + c, with c [out] trained, starting at 0: the change of the layer's bias. A linear without a
/// bias is given one. Weight decay draws c to 0, that is the bias to the base's. There is no rank and no dropout.
/// Merging adds c to the bias, which the model's configuration must have. Source: BitFit (arXiv 2106.10199), section 3;
/// there only biases that the model has are trained.
const Parametrisation& bitfit();

}  // namespace moraine::algorithms::adapters
