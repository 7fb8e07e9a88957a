#pragma once

#include "algorithms/adapters/parametrisation.h"

namespace moraine::algorithms::adapters {

/// (IA)^3: y = l * base(x), bias included, with l [out, 1]; in feed-forward modules y = base(l * x) with l [1, in].
///
/// Trained: l, starting at ones. Feed-forward modules are those whose path ends with a name of
/// options.feedforward_modules or matches options.feedforward_regex, by PEFT's rules; no others scale their input.
/// Names must be among target_modules unless these are all-linear or a pattern. Merging scales rows and bias, or
/// columns, of the weight. There is no rank, no dropout and, in PEFT, no choice of layers. Source: (IA)^3 (arXiv
/// 2205.05638), section 3.3; PEFT 0.21 for which side is scaled where.
const Parametrisation& ia3();

}  // namespace moraine::algorithms::adapters
