#pragma once

#include "algorithms/mergers/elementwise.h"

namespace moraine::algorithms::mergers {

/// Of each place the values of the sign that was elected there: their weighted sum divided by how many they are.
/// Zeros have no sign; a tie elects the positive one. Elected is the sign of sum_i t_i (majority_sign_method total) or
/// of sum_i sgn(t_i) (frequency), neither weighted, as PEFT 0.21 does it.
at::Tensor elected_mean(const Values& values, const MergeConfig& config);

/// TIES (arXiv 2306.01708, section 4): trim every tensor to its largest share `density`, elect signs, disjoint mean.
/// Trimming is by slot and tensor as in PEFT; the paper trims over the whole model.
const Merger& ties(On on);

/// What it does to tensors.
at::Tensor ties_rule(const Values& values, const MergeConfig& config);

}  // namespace moraine::algorithms::mergers
