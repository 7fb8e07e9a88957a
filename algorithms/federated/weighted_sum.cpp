#include "algorithms/federated/weighted_sum.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "core/error.h"

namespace moraine::algorithms::federated {
namespace {

constexpr size_t kBlock = 4096;  // doubles: 32 KiB of sums and 16 KiB of one part fit the first-level cache

}  // namespace

void weighted_sum(std::span<const std::span<const std::byte>> parts, std::span<const double> weights,
                  std::span<float> out) {
  MORAINE_CHECK_EQ(parts.size(), weights.size());
  for (const auto& part : parts) MORAINE_CHECK_EQ(part.size(), out.size_bytes());
  std::array<double, kBlock> sums;
  std::array<float, kBlock> values;
  for (size_t first = 0; first < out.size(); first += kBlock) {
    const size_t count = std::min(kBlock, out.size() - first);
    std::fill_n(sums.begin(), count, 0.0);
    for (size_t k = 0; k < parts.size(); ++k) {
      std::memcpy(values.data(), parts[k].data() + first * sizeof(float), count * sizeof(float));
      const double weight = weights[k];
      for (size_t i = 0; i < count; ++i) sums[i] += weight * static_cast<double>(values[i]);
    }
    for (size_t i = 0; i < count; ++i) out[first + i] = static_cast<float>(sums[i]);
  }
}

}  // namespace moraine::algorithms::federated
