#include "algorithms/federated/client_data.h"

#include "core/error.h"
#include "core/hash.h"
#include "data/permutation.h"

namespace moraine::algorithms::federated {

ClientData::ClientData(const std::string& client, std::vector<Part> parts, uint64_t seed)
    : parts_(std::move(parts)), seed_(seed) {
  for (const auto& part : parts_) total_ += part.count;
  if (total_ == 0)
    throw core::UserError(fmt::format("algorithms/federated: {} has no training sequence", client),
                          "fewer clients, a larger clients.alpha, or more text");
}

std::vector<int64_t> ClientData::rows(int64_t first, int64_t count) const {
  std::vector<int64_t> wanted(static_cast<size_t>(count));
  for (int64_t row = 0; row < count; ++row) {
    const int64_t place = first + row;
    const data::Permutation order(total_, core::derive_seed(seed_, fmt::format("epoch{}", place / total_)));
    wanted[static_cast<size_t>(row)] = order(place % total_);
  }
  std::vector<int64_t> out;
  for (int64_t index : wanted) {
    auto part = parts_.begin();
    for (; index >= part->count; ++part) index -= part->count;
    const data::Permutation shuffled(part->dataset->num_sequences(), part->order);
    const std::vector<int64_t> row = part->dataset->sequence(shuffled(part->first + index));
    out.insert(out.end(), row.begin(), row.end());
  }
  return out;
}

}  // namespace moraine::algorithms::federated
