#include "algorithms/federated/partition.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include <fmt/format.h>

#include "core/hash.h"

namespace moraine::algorithms::federated {
namespace {

// Ends of shares proportional to `weights`: boundaries of the rounded cumulative sum, so that they cover [0, total).
std::vector<Share> split(int64_t total, const std::vector<double>& weights) {
  const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
  std::vector<Share> shares;
  double passed = 0;
  int64_t first = 0;
  for (size_t k = 0; k < weights.size(); ++k) {
    passed += weights[k];
    const int64_t end =
        k + 1 == weights.size()
            ? total
            : std::min(total, static_cast<int64_t>(std::llround(static_cast<double>(total) * passed / sum)));
    shares.push_back({first, end - first});
    first = end;
  }
  return shares;
}

std::vector<double> weights_of_domain(size_t domain, size_t domains, const ClientsConfig& config, uint64_t seed) {
  const auto clients = static_cast<size_t>(config.count);
  std::vector<double> weights(clients, 1.0);
  if (config.partition == "domain") {
    for (size_t k = 0; k < clients; ++k) weights[k] = k % domains == domain ? 1.0 : 0.0;
  } else if (config.partition == "dirichlet") {
    std::mt19937_64 generator(core::derive_seed(seed, fmt::format("partition/{}", domain)));
    std::gamma_distribution<double> gamma(config.alpha, 1.0);
    for (double& weight : weights) weight = gamma(generator);
    // All below the smallest double happens for tiny alpha: the whole domain then goes to one client.
    if (std::accumulate(weights.begin(), weights.end(), 0.0) == 0) weights[generator() % clients] = 1;
  }
  return weights;
}

}  // namespace

int64_t Client::sequences() const {
  return std::accumulate(shares.begin(), shares.end(), int64_t{0},
                         [](int64_t sum, const auto& share) { return sum + share.second.count; });
}

std::vector<Client> partition(const std::vector<std::pair<std::string, int64_t>>& sequences,
                              const ClientsConfig& config, uint64_t seed) {
  const auto digits = fmt::formatted_size("{}", config.count);
  std::vector<Client> clients(static_cast<size_t>(config.count));
  for (size_t k = 0; k < clients.size(); ++k) {
    clients[k].name = fmt::format("client-{:0{}}", k + 1, digits);
    if (!config.ranks.empty()) clients[k].rank = config.ranks[k % config.ranks.size()];
  }
  for (size_t d = 0; d < sequences.size(); ++d) {
    const auto& [domain, total] = sequences[d];
    const std::vector<Share> shares = split(total, weights_of_domain(d, sequences.size(), config, seed));
    for (size_t k = 0; k < clients.size(); ++k)
      if (shares[k].count > 0) clients[k].shares[domain] = shares[k];
  }
  return clients;
}

std::vector<size_t> sample_clients(const std::vector<Client>& clients, int64_t per_round, int64_t round,
                                   uint64_t seed) {
  std::vector<size_t> chosen(clients.size());
  std::iota(chosen.begin(), chosen.end(), size_t{0});
  if (per_round == 0 || per_round >= static_cast<int64_t>(clients.size())) return chosen;
  std::vector<uint64_t> lots;
  for (const auto& client : clients)
    lots.push_back(core::derive_seed(seed, fmt::format("sample/{}/{}", round, client.name)));
  std::sort(chosen.begin(), chosen.end(),
            [&](size_t a, size_t b) { return lots[a] != lots[b] ? lots[a] < lots[b] : a < b; });
  chosen.resize(static_cast<size_t>(per_round));
  std::sort(chosen.begin(), chosen.end());
  return chosen;
}

}  // namespace moraine::algorithms::federated
