#include "algorithms/mergers/dare.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty_like.h>

#include "algorithms/mergers/ties.h"

namespace moraine::algorithms::mergers {
namespace {

Values dropped_and_rescaled(const Values& values, double density) {
  Values kept = values;
  if (density >= 1) return kept;
  for (size_t i = 0; i < kept.tensors.size(); ++i) {
    auto generator = at::detail::createCPUGenerator(kept.seeds[i]);
    const at::Tensor draws = at::empty_like(kept.tensors[i]).uniform_(0, 1, generator);
    kept.tensors[i] = kept.tensors[i] * (draws < density) / density;
  }
  return kept;
}

}  // namespace

const Merger& dare_linear(On on) {
  static const ElementwiseForms forms("dare_linear",
                                      "weighted sum of randomly dropped and rescaled numbers (DARE, 2311.03099)",
                                      [](const Values& values, const MergeConfig& config) {
                                        return sum_of(dropped_and_rescaled(values, *config.density));
                                      },
                                      {.density = true, .seed = true});
  return forms.on(on);
}

const Merger& dare_ties(On on) {
  static const ElementwiseForms forms(
      "dare_ties", "ties after dropping at random and rescaling instead of trimming (DARE, 2311.03099)",
      [](const Values& values, const MergeConfig& config) {
        return elected_mean(dropped_and_rescaled(values, *config.density), config);
      },
      {.density = true, .sign = true, .seed = true});
  return forms.on(on);
}

}  // namespace moraine::algorithms::mergers
