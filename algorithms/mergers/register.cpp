#include <algorithm>

#include "algorithms/mergers/concat.h"
#include "algorithms/mergers/dare.h"
#include "algorithms/mergers/knots.h"
#include "algorithms/mergers/linear.h"
#include "algorithms/mergers/magnitude_prune.h"
#include "algorithms/mergers/merger.h"
#include "algorithms/mergers/svd.h"
#include "algorithms/mergers/ties.h"
#include "core/error.h"
#include "core/registry.h"

namespace moraine::algorithms::mergers {

const std::vector<const Merger*>& mergers() {
  static const std::vector<const Merger*> all = {
      &concat(),
      &dare_linear(On::kFactors),
      &dare_linear(On::kDense),
      &dare_linear(On::kSvd),
      &dare_ties(On::kFactors),
      &dare_ties(On::kDense),
      &dare_ties(On::kSvd),
      &knots(),
      &linear(),
      &magnitude_prune(On::kFactors),
      &magnitude_prune(On::kDense),
      &magnitude_prune(On::kSvd),
      &svd(),
      &ties(On::kFactors),
      &ties(On::kDense),
      &ties(On::kSvd),
  };
  return all;
}

const Merger& merger(const std::string& name) {
  std::vector<std::string> known;
  for (const Merger* candidate : mergers()) {
    if (candidate->name() == name) return *candidate;
    known.push_back(candidate->name());
  }
  throw core::UserError(fmt::format("algorithms/mergers: no type of merger '{}'", name), core::name_hint(name, known));
}

}  // namespace moraine::algorithms::mergers
