#include "algorithms/mergers/magnitude_prune.h"

namespace moraine::algorithms::mergers {
namespace {

at::Tensor rule(const Values& values, const MergeConfig& config) {
  Values kept = values;
  for (at::Tensor& tensor : kept.tensors) tensor = pruned(tensor, *config.density);
  return sum_of(kept);
}

}  // namespace

const Merger& magnitude_prune(On on) {
  static const ElementwiseForms forms("magnitude_prune", "weighted sum of the largest numbers of each", rule,
                                      {.density = true});
  return forms.on(on);
}

}  // namespace moraine::algorithms::mergers
