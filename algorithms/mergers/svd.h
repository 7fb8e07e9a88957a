#pragma once

#include "algorithms/mergers/merger.h"

namespace moraine::algorithms::mergers {

/// The best approximation of rank r of the weighted sum of the changes (PEFT 0.21's "svd"), by QR decompositions of the
/// factors side by side and a small SVD: never dense, unless a contribution is.
const Merger& svd();

}  // namespace moraine::algorithms::mergers
