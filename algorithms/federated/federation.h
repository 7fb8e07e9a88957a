#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

#include "algorithms/adapters/adapter.h"
#include "algorithms/federated/config.h"
#include "core/artefact.h"

namespace moraine::algorithms::federated {

/// Tensors of an adapter by their names in adapters::Adapter, float32 on the CPU unless said otherwise.
using Tensors = std::map<std::string, at::Tensor>;
/// The exact change of every slot, by its path.
using Changes = std::map<std::string, adapters::Factored>;

/// Behind a slot's path, in a state: W0 becomes W0 + base_B base_A, once and for all.
constexpr const char *kBaseA = ".base_A", *kBaseB = ".base_B";

/// What one client sent in one round.
struct Contribution {
  std::string client;
  double weight = 0;  // p_k; the weights of a round sum to one
  int64_t rank = 0;
  core::ArtefactPtr artefact;
};

/// The global model after a round.
struct GlobalState {
  Tensors adapter;                   // what is trained: what clients start from
  Tensors base_change;               // "<slot path>.base_A" [r, in], "<slot path>.base_B" [out, r]
  Tensors server;                    // the server optimiser's moments, never sent
  std::vector<double> weights = {};  // of the contributions, when the method does not weigh them as it was told
};

/// One aggregation: what came in, in the order of the clients' names, and what it starts from.
struct Round {
  std::vector<Contribution> contributions;
  Tensors global;  // what is trained and sent, before the round; empty where every round starts afresh
  Tensors server;  // moments before the round; empty in the first one
  ServerConfig optimizer;
  adapters::TrainedTensors trained;  // of the global adapter
  /// The change that a contribution is of the model it was trained on, and that the global adapter is with other
  /// trained tensors.
  std::function<Changes(const Contribution&)> change_of;
  std::function<Changes(const Tensors& global)> change_with;

  /// sum_k p_k x_k of one tensor; reads one contribution after the other, holds one sum.
  at::Tensor average(const std::string& name) const;
};

/// What a method cannot do, and what would.
struct Refusal {
  std::string why, hint;
};

/// Refuses adapters whose change is no product of factors; `what` the method does with them.
std::optional<Refusal> unless_factors(const adapters::AdapterConfig& adapter, const std::string& what);

/// What tells one federated method from another. The base class is FedIT: train everything, average each tensor by
/// itself. Methods know adapters by adapters::Traits and by their change in factors, never by names. Stateless and
/// thread-safe. Source of all: the federated LoRA family; per method in its own folder.
class Federation {
 public:
  virtual ~Federation() = default;
  /// Trained and sent is only what averages exactly (adapters::TensorTraits); the rest keeps its first values.
  virtual bool trains_exact_only() const { return false; }
  /// Clients start every round from fresh values instead of the global ones.
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
  /// Why the method is not for this adapter, if it is not.
  virtual std::optional<Refusal> refusal(const adapters::AdapterConfig&) const { return std::nullopt; }
  /// Added to a client's mean loss; undefined = nothing. `tensors` are the adapter's live ones.
  virtual at::Tensor penalty(const Tensors& tensors, const adapters::TrainedTensors& trained,
                             const PruningConfig& config) const;
  /// The rank a client sends and goes on with, from its tensors before and after training.
  virtual int64_t rank_after(const Tensors& before, const Tensors& after, const adapters::TrainedTensors& trained,
                             int64_t rank, const PruningConfig& config) const;
  /// The next global state. Throws core::Error if it cannot be formed.
  virtual GlobalState aggregate(const Round& round) const;
  /// Of the numbers that a round adds to the base those that are due to one contribution, whose change this is.
  virtual int64_t numbers_added(const Changes&) const { return 0; }

  /// Whether a trained tensor of the adapter is trained and sent.
  bool trains(const adapters::TensorTraits& tensor) const { return !trains_exact_only() || tensor.averages_exactly; }
};

/// x + D, D = average - x, moved by the server's optimiser; updates its moments in `moments` ("m.<name>", "v.<name>").
///   fedavg   the average itself, bit for bit
///   fedavgm  v <- b1 v + (1 - b1) D, in the first round v = D;  x + v
///   fedadam  m <- b1 m + (1 - b1) D;  v <- b2 v + (1 - b2) D^2, v starts at tau^2;  x + eta m / (sqrt(v) + tau)
///   fedyogi  the same with v <- v - (1 - b2) D^2 sign(v - D^2)
///   fedadagrad  v <- v + D^2, v starts at tau^2;  x + eta D / (sqrt(v) + tau)
/// In double, rounded to float32 once.
at::Tensor server_step(const ServerConfig& config, const std::string& name, const at::Tensor& x,
                       const at::Tensor& average, const Tensors& before, Tensors& moments);

/// Sums of products b a by slot, kept as factors side by side.
class Stack {
 public:
  void add(const std::string& slot, const at::Tensor& b, const at::Tensor& a);
  /// By slot, b [out, R] and a [R, in], whose product is the sum.
  std::map<std::string, std::pair<at::Tensor, at::Tensor>> pairs() const;
  /// The same as GlobalState::base_change.
  Tensors base_change() const;

 private:
  std::map<std::string, std::vector<at::Tensor>> b_, a_;
};

/// Numbers in the factors of a change: in all parts, or in those that training moves.
int64_t numbers_in(const Changes& changes, bool with_frozen);

}  // namespace moraine::algorithms::federated
