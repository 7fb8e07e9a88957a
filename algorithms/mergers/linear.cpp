#include "algorithms/mergers/linear.h"

#include "algorithms/mergers/elementwise.h"

namespace moraine::algorithms::mergers {

const Merger& linear() {
  static const ElementwiseMerger instance(
      "linear", "weighted sum (PEFT's linear)", [](const Values& values, const MergeConfig&) { return sum_of(values); },
      {}, On::kFactors);
  return instance;
}

}  // namespace moraine::algorithms::mergers
