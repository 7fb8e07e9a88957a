#pragma once

#include "algorithms/mergers/merger.h"

namespace moraine::algorithms::mergers {

/// The weighted sum of the changes, exactly: factors side by side, B = [B_1 ...], A = [w_1 s_1 A_1; ...], whose ranks
/// add up (PEFT 0.21's "cat"); dense as soon as one contribution is.
const Merger& concat();

}  // namespace moraine::algorithms::mergers
