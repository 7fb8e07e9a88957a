#pragma once

#include "algorithms/mergers/elementwise.h"

namespace moraine::algorithms::mergers {

/// sum_i w_i keep(t_i), keep: the largest share `density` of a tensor's numbers, zeros elsewhere. Source: PEFT 0.21's
/// "magnitude_prune" and "magnitude_prune_svd".
const Merger& magnitude_prune(On on);

}  // namespace moraine::algorithms::mergers
