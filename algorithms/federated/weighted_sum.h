#pragma once

#include <cstddef>
#include <span>
#include <vector>

namespace moraine::algorithms::federated {

/// out[i] = sum_k weights[k] * parts[k][i], added in the order of `parts` in double and rounded to float once, so the
/// bits depend on the order of `parts` alone. Works through the parts block by block: each is read once, the sums stay
/// in cache. All parts are as long as `out`, which overlaps none of them. Unaligned parts (tensors of mapped files) are
/// fine. Thread-safe.
void weighted_sum(std::span<const std::span<const std::byte>> parts, std::span<const double> weights,
                  std::span<float> out);

}  // namespace moraine::algorithms::federated
