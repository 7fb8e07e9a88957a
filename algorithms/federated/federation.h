#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include <ATen/core/Tensor.h>

#include "algorithms/federated/config.h"
#include "core/artefact.h"

namespace moraine::algorithms::federated {

/// LoRA factors by name, "<slot path>.lora_A.weight" [r, in] and "<slot path>.lora_B.weight" [out, r], float32 on the
/// CPU.
using Factors = std::map<std::string, at::Tensor>;

/// What one client sent in one round.
struct Contribution {
  std::string client;
  double weight = 0;  // p_k; the weights of a round sum to one
  int64_t rank = 0;
  core::ArtefactPtr artefact;

  /// A trained factor, over the artefact's bytes.
  at::Tensor factor(const std::string& name) const;
};

/// The global model after a round.
struct GlobalState {
  Factors factors;                   // the global adapter: what clients start from
  Factors base_change;               // "<slot path>.base_A", ".base_B": W0 becomes W0 + base_B base_A, once and for all
  Factors server;                    // the server optimiser's moments, never sent
  std::vector<double> weights = {};  // of the contributions, when the method does not weigh them as it was told
};

/// One aggregation: what came in, in the order of the clients' names, and what it starts from.
struct Round {
  std::vector<Contribution> contributions;
  Factors global;    // before the round; from the seed in the first one
  Factors server;    // moments before the round; empty in the first one
  double scale = 1;  // s of y = W0 x + s B A x, the same for all ranks
  ServerConfig optimizer;

  /// sum_k p_k x_k of one factor; reads one contribution after the other, holds one sum.
  at::Tensor average(const std::string& name) const;
  /// Slot paths of the adapter, sorted.
  std::vector<std::string> slots() const;
};

/// What tells one federated LoRA method from another. The base class is FedIT: train A and B, average each by itself.
/// Stateless and thread-safe. Source of all: the federated LoRA family; per method in its own folder.
class Federation {
 public:
  virtual ~Federation() = default;
  /// Whether a factor ("lora_A.weight" or "lora_B.weight") is trained and sent; the others keep their values from the
  /// seed.
  virtual bool trains(std::string_view factor) const;
  /// Clients start every round from fresh factors instead of the global ones.
  virtual bool starts_fresh() const { return false; }
  /// Rounds change the base model (GlobalState::base_change).
  virtual bool changes_base() const { return false; }
  /// Clients may have different ranks.
  virtual bool mixed_ranks() const { return false; }
  /// The server may move by another rule than by the average itself.
  virtual bool server_optimizers() const { return true; }
  /// Contributions count as clients.weighting says; else by the method's own weights.
  virtual bool weighs_as_told() const { return true; }
  /// Ranks shrink: penalty() and rank_after() read PruningConfig.
  virtual bool prunes() const { return false; }
  /// Part of the specification of the units that run this code; raised when a change of it changes results.
  virtual int64_t result_version() const { return 1; }
  /// Added to a client's mean loss; undefined = nothing. `factors` are the adapter's live tensors.
  virtual at::Tensor penalty(const Factors& factors, const PruningConfig& config) const;
  /// The rank a client sends and goes on with, from its factors before and after training.
  virtual int64_t rank_after(const Factors& before, const Factors& after, int64_t rank,
                             const PruningConfig& config) const;
  /// The next global state. Throws core::Error if it cannot be formed.
  virtual GlobalState aggregate(const Round& round) const;
  /// Bytes of one adapted [out, in] matrix that a client sends and receives per round, in numbers: the paper's count,
  /// for a client of rank r; R: the summed ranks of the changes of the base it is sent.
  struct Traffic {
    int64_t up = 0, down = 0;
  };
  virtual Traffic traffic(int64_t in, int64_t out, int64_t rank, int64_t sum_of_ranks, int64_t max_rank) const;
};

/// x + D, D = average - x, moved by the server's optimiser; updates its moments in `moments` ("m.<name>", "v.<name>").
///   fedavg   the average itself, bit for bit
///   fedavgm  v <- b1 v + (1 - b1) D, in the first round v = D;  x + v
///   fedadam  m <- b1 m + (1 - b1) D;  v <- b2 v + (1 - b2) D^2, v starts at tau^2;  x + eta m / (sqrt(v) + tau)
/// In double, rounded to float32 once.
at::Tensor server_step(const ServerConfig& config, const std::string& name, const at::Tensor& x,
                       const at::Tensor& average, const Factors& before, Factors& moments);

/// The first `rank` directions: rows of A, columns of B.
Factors cut(const Factors& factors, int64_t rank);

}  // namespace moraine::algorithms::federated
