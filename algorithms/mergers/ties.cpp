#include "algorithms/mergers/ties.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

namespace moraine::algorithms::mergers {

at::Tensor elected_mean(const Values& values, const MergeConfig& config) {
  const bool by_count = config.majority_sign_method.value_or("total") == "frequency";
  at::Tensor votes = at::zeros_like(values.tensors.front());
  for (const at::Tensor& tensor : values.tensors) votes.add_(by_count ? tensor.sign() : tensor);
  const at::Tensor elected = at::where(votes >= 0, 1.0, -1.0);
  at::Tensor sum = at::zeros_like(votes), count = at::zeros_like(votes);
  for (size_t i = 0; i < values.tensors.size(); ++i) {
    const at::Tensor agrees = values.tensors[i].sign() == elected;
    sum.add_(values.tensors[i] * agrees, values.weights[i]);
    count.add_(agrees);
  }
  return sum.div_(count.clamp_min_(1));
}

at::Tensor ties_rule(const Values& values, const MergeConfig& config) {
  Values trimmed = values;
  for (at::Tensor& tensor : trimmed.tensors) tensor = pruned(tensor, *config.density);
  return elected_mean(trimmed, config);
}

const Merger& ties(On on) {
  static const ElementwiseForms forms("ties",
                                      "mean of the largest numbers that have the elected sign (TIES, 2306.01708)",
                                      ties_rule, {.density = true, .sign = true});
  return forms.on(on);
}

}  // namespace moraine::algorithms::mergers
