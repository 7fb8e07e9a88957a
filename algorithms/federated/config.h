#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "algorithms/adapters/config.h"
#include "algorithms/run_config.h"
#include "algorithms/worker_context.h"
#include "core/config.h"

namespace moraine::algorithms::federated {

/// The frozen model that all clients have.
struct ModelConfig {
  std::string path;  // Hugging Face directory of a decoder
};

/// One prepared text file; clients share its training sequences out among themselves, its test text is what is
/// measured.
struct DomainConfig {
  std::string name;
  std::string path;
};

/// Who holds which training sequences, and who takes part in a round.
struct ClientsConfig {
  int64_t count = 10;
  std::string partition = "domain";   // domain | dirichlet | iid
  double alpha = 0.5;                 // dirichlet: smaller = more skewed
  int64_t per_round = 0;              // sampled clients; 0 = all
  std::string weighting = "samples";  // samples | uniform
  std::vector<int64_t> ranks;         // per client, repeated as needed; empty = lora.rank for all
  double proximal = 0;                // mu of FedProx (arXiv 1812.06127): (mu / 2) |w - x|^2 is added to the mean loss
  int64_t min_per_round = 0;          // a round goes on with at least this many usable contributions; 0 = all of them
};

/// What the server does with an averaged change. Source: "Adaptive Federated Optimization" (Reddi et al. 2021) by way
/// of OpenFedLLM's defaults.
struct ServerConfig {
  std::string optimizer = "fedavg";  // fedavg | fedavgm | fedadagrad | fedadam | fedyogi
  double learning_rate = 1e-3;       // eta of fedadagrad, fedadam, fedyogi
  double beta1 = 0.9, beta2 = 0.99;
  double tau = 1e-3;  // added to the root of fedadagrad, fedadam, fedyogi; v starts at tau^2
};

/// HetLoRA only: how ranks shrink.
struct PruningConfig {
  double gamma = 0.99;   // the tail starts at floor(gamma * rank)
  double lambda = 1e-3;  // weight of the tail's norm in the local loss
  int64_t min_rank = 1;
};

struct EvaluationConfig {
  int64_t sequences = 128;  // per domain; 0 = all
  int64_t batch_size = 16;
  int64_t every = 1;           // rounds
  std::string split = "test";  // test | validation
};

struct FederatedConfig : RunConfig {
  ModelConfig model;
  std::vector<DomainConfig> domains;
  int64_t seq_len = 256;
  std::string tokenizer = "bytes-v1";
  ClientsConfig clients;
  int64_t rounds = 5;
  adapters::AdapterConfig lora;  // of any type; the key is from when there was one
  TrainConfig train;             // of one client in one round
  ServerConfig server;
  PruningConfig pruning;
  std::vector<std::string> comparisons;  // centralised | alone
  EvaluationConfig evaluation;
};

const core::Schema<FederatedConfig>& federated_schema();
const core::Schema<ServerConfig>& server_schema();
const core::Schema<PruningConfig>& pruning_schema();

}  // namespace moraine::algorithms::federated
