#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "algorithms/federated/config.h"

namespace moraine::algorithms::federated {

/// A run of places in a domain's shuffled order of training sequences.
struct Share {
  int64_t first = 0, count = 0;
};

/// One client's training data: shares of the domains, by name.
struct Client {
  std::string name;  // "client-03"
  std::map<std::string, Share> shares;
  int64_t rank = 0;  // 0 = the adapter's own

  int64_t sequences() const;
};

/// Shares the training sequences of every domain out among the clients: each sequence belongs to exactly one client.
/// `sequences`: training sequences per domain, by name. Pure: the same sizes, settings and seed give the same clients.
///   domain     clients take the domains in turn; a domain's clients share it evenly
///   iid        every client has an even share of every domain
///   dirichlet  per domain, shares ~ Dirichlet(alpha) over the clients, rounded so that they sum up
/// Clients may end up without a sequence; the caller decides what that means.
std::vector<Client> partition(const std::vector<std::pair<std::string, int64_t>>& sequences,
                              const ClientsConfig& config, uint64_t seed);

/// The clients of a round, as increasing indices: the `per_round` with the smallest hash of (seed, round, name).
std::vector<size_t> sample_clients(const std::vector<Client>& clients, int64_t per_round, int64_t round, uint64_t seed);

}  // namespace moraine::algorithms::federated
