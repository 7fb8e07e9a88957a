#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "data/text_dataset.h"

namespace moraine::algorithms::federated {

/// The training sequences of one client, out of several domains. A domain's sequences have one shuffled order for all
/// clients; a client owns a run of places in it. Thread-safe to read.
class ClientData {
 public:
  struct Part {
    std::shared_ptr<data::TextDataset> dataset;  // training split
    uint64_t order = 0;                          // key of the domain's shuffled order
    int64_t first = 0, count = 0;
  };
  /// Throws UserError if the client has no sequence.
  ClientData(const std::string& client, std::vector<Part> parts, uint64_t seed);

  int64_t sequences() const { return total_; }
  /// Sequences [first, first + count) of an endless pass over the client's data, every epoch in an order of its own:
  /// row-major [count, seq_len + 1]. Pure in (seed, first, count).
  std::vector<int64_t> rows(int64_t first, int64_t count) const;

 private:
  std::vector<Part> parts_;
  uint64_t seed_;
  int64_t total_ = 0;
};

}  // namespace moraine::algorithms::federated
