#pragma once

#include "algorithms/mergers/elementwise.h"

namespace moraine::algorithms::mergers {

/// DARE (arXiv 2311.03099, section 3): every number is kept with probability `density` and divided by it, so that the
/// expectation stays; then a weighted sum (dare_linear) or TIES' election and mean (dare_ties), as in PEFT 0.21.
///
/// Which numbers are kept is a function of (MergeConfig::seed, slot path, tensor, Contribution::identity) alone:
/// neither the other contributions nor their order matter. torch's own masks are not reproduced.
const Merger& dare_linear(On on);
const Merger& dare_ties(On on);

}  // namespace moraine::algorithms::mergers
