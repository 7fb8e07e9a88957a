#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "algorithms/adapters/config.h"
#include "algorithms/federated/config.h"
#include "algorithms/language_model.h"
#include "core/config.h"
#include "core/json.h"

namespace moraine::algorithms::federated {

// What the units of a federation do: one struct per kind, written by plan() and read by execute(). Nothing else of a
// recipe decides what a worker computes; its own copy says where files are and how often to save and to log. Each kind
// has its own result version, raised when a change of the code changes results for the same specification; a
// Federation's (Federation::result_version) goes into the kinds that run its code.

/// What a state leaves to the seed: the global adapter's first values, and those that are never sent.
struct GlobalAdapter {
  adapters::AdapterConfig lora = {};  // the recipe's; other ranks keep its scale: at_rank()
  int64_t rank = 1;                   // of the server's adapter: the largest of the clients'
  int64_t seed = 0;
  int64_t type_version = 1;  // Parametrisation::result_version()
  bool start = false;        // the first input is the adapter as it starts: starts_from_weights()
};

/// Makes the global adapter as it starts, once for all, where that follows from the base's weights.
struct StartSpec {
  static constexpr const char* kKind = "start";
  static constexpr int64_t kVersion = 1;
  int64_t version = kVersion;
  core::Json compute = {};
  std::string base = {};
  std::string dtype = "float32";
  GlobalAdapter adapter = {};
};
const core::Schema<StartSpec>& start_schema();

/// Places [first, first + count) of a domain's shuffled order of training sequences.
struct ShareSpec {
  TextSpec data = {};
  int64_t first = 0, count = 0;
};

/// Trains one client. Inputs: what it needs to rebuild the global model: the start, if there is one, then states, the
/// last one last. Gives its contribution.
struct UpdateSpec {
  static constexpr const char* kKind = "client_update";
  static constexpr int64_t kVersion = 2;
  int64_t version = kVersion;
  std::string method = {};
  int64_t method_version = 1;
  core::Json compute = {};  // compute_identity(): what else bits depend on
  std::string base = {};    // identity of the frozen model
  std::string client = {};
  int64_t round = 0;
  std::vector<ShareSpec> shares = {};
  int64_t rank = 1;            // of the client's adapter
  GlobalAdapter adapter = {};  // its rank is 0 when every round starts afresh: then nothing depends on it
  core::Json train = {};       // train_identity()
  bool tolerant = false;       // numbers that go bad make a contribution that says so instead of an error
  double proximal = 0;         // mu of FedProx
  std::optional<PruningConfig> pruning = {};  // methods whose ranks shrink

  int64_t samples() const;    // training sequences
  uint64_t own_seed() const;  // of the client's own draws, and of the first values of rounds that start afresh
};
const core::Schema<UpdateSpec>& update_schema();

/// A client of a round, as the plan knows it.
struct RoundClient {
  std::string name = {};
  int64_t samples = 0;
};

/// Forms the next global state. Inputs: the start and the state before, if any, then the contributions in the order of
/// `clients`.
struct AggregateSpec {
  static constexpr const char* kKind = "aggregate";
  static constexpr int64_t kVersion = 2;
  int64_t version = kVersion;
  std::string method = {};
  int64_t method_version = 1;
  core::Json compute = {};
  std::string base = {};
  int64_t round = 0;
  std::vector<RoundClient> clients = {};
  std::string weighting = "samples";
  int64_t min_per_round = 0;
  ServerConfig server = {};
  GlobalAdapter adapter = {};
  bool has_state = false;
};
const core::Schema<AggregateSpec>& aggregate_schema();

/// Cuts a state to what clients of one rank are sent. Input: the state.
struct BroadcastSpec {
  static constexpr const char* kKind = "broadcast";
  static constexpr int64_t kVersion = 2;
  int64_t version = kVersion;
  int64_t rank = 1;
  adapters::AdapterConfig lora = {};  // the recipe's
};
const core::Schema<BroadcastSpec>& broadcast_schema();

/// Scores a global model, a contribution on its own, or the base. Inputs: as UpdateSpec's, the contribution in place
/// of a state; none for the base.
struct EvaluateSpec {
  static constexpr const char* kKind = "evaluate";
  static constexpr int64_t kVersion = 2;
  int64_t version = kVersion;
  core::Json compute = {};
  std::string base = {};
  std::string dtype = "float32";
  TextSpec data = {};
  int64_t sequences = 0;
  int64_t batch_size = 1;
  std::optional<GlobalAdapter> adapter = {};  // none for the base
};
const core::Schema<EvaluateSpec>& evaluate_schema();

/// `lora` at another rank: alpha follows, so that the scale is the same for all clients (inferred: FLoRA's code takes
/// alpha_k = 2 r_k; papers with one alpha for all would weigh clients by 1 / r_k).
adapters::AdapterConfig at_rank(const adapters::AdapterConfig& lora, int64_t rank);

}  // namespace moraine::algorithms::federated
