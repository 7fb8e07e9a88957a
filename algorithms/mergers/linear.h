#pragma once

#include "algorithms/mergers/merger.h"

namespace moraine::algorithms::mergers {

/// A = sum_i sgn(w_i s_i) sqrt|w_i s_i| A_i, B = sum_i sqrt|w_i s_i| B_i: PEFT 0.21's "linear". Cheap and rough: the
/// product of sums has products of A_i with B_j in it. On the changes the same rule is `concat` (exact) and `svd`
/// (cut).
const Merger& linear();

}  // namespace moraine::algorithms::mergers
