#include "algorithms/federated/config.h"

#include <set>

#include "core/error.h"

namespace moraine::algorithms::federated {
namespace {

using Violation = std::optional<std::string>;

const core::Schema<ModelConfig>& model_schema() {
  static const auto schema = [] {
    core::Schema<ModelConfig> s;
    s.field("path", &ModelConfig::path)
        .required()
        .path()
        .doc("Hugging Face directory (config.json + safetensors) of the frozen model");
    return s;
  }();
  return schema;
}

const core::Schema<DomainConfig>& domain_schema() {
  using C = DomainConfig;
  static const auto schema = [] {
    core::Schema<C> s;
    s.field("name", &C::name)
        .required()
        .doc("Name of the text domain")
        .field("path", &C::path)
        .required()
        .path()
        .doc("Prepared HDF5 file (scripts/prepare_text.py)");
    return s;
  }();
  return schema;
}

const core::Schema<ClientsConfig>& clients_schema() {
  using C = ClientsConfig;
  static const auto schema = [] {
    core::Schema<C> s;
    s.field("count", &C::count)
        .min(1)
        .max(100000)
        .doc("Clients of the federation")
        .field("partition", &C::partition)
        .choices({"domain", "dirichlet", "iid"})
        .doc(
            "Who holds which sequences: one domain per client, Dirichlet shares of every domain, or a random even "
            "split")
        .field("alpha", &C::alpha)
        .above(0)
        .doc("dirichlet: concentration; smaller is more skewed")
        .field("per_round", &C::per_round)
        .min(0)
        .doc("Clients sampled per round, without replacement; 0 = all")
        .field("weighting", &C::weighting)
        .choices({"samples", "uniform"})
        .doc(
            "Weight of a contribution: its share of the sampled clients' sequences, or equal; hetlora weighs by the "
            "norm of the update instead")
        .field("ranks", &C::ranks)
        .min(1)
        .doc("Ranks of the clients in order, repeated as needed; empty = lora.rank for all")
        .field("proximal", &C::proximal)
        .min(0)
        .joined_later()
        .doc("FedProx: pull of a client towards the global adapter, mu; larger keeps clients nearer to each other")
        .field("min_per_round", &C::min_per_round)
        .min(0)
        .doc(
            "Usable contributions a round needs; 0 = every sampled client's. Clients whose numbers go bad are then "
            "left "
            "out of the round and named in the report; a site's own trouble (a missing file, a full disk) is tried "
            "again and never part of a result")
        .check([](const C& c) -> Violation {
          if (c.per_round > c.count)
            return fmt::format("per_round {} is more than the {} clients", c.per_round, c.count);
          const int64_t sampled = c.per_round ? c.per_round : c.count;
          if (c.min_per_round > sampled)
            return fmt::format("min_per_round {} is more than the {} clients of a round", c.min_per_round, sampled);
          return std::nullopt;
        });
    return s;
  }();
  return schema;
}

const core::Schema<EvaluationConfig>& evaluation_schema() {
  using C = EvaluationConfig;
  static const auto schema = [] {
    core::Schema<C> s;
    s.field("sequences", &C::sequences)
        .evaluation_only()
        .min(0)
        .doc("Evaluated sequences per domain; 0 = all")
        .field("batch_size", &C::batch_size)
        .evaluation_only()
        .min(1)
        .doc("Sequences per forward pass")
        .field("every", &C::every)
        .evaluation_only()
        .min(1)
        .unit("rounds")
        .doc("Rounds between evaluations of the global model; the last round is always evaluated")
        .field("split", &C::split)
        .evaluation_only()
        .choices({"test", "validation"})
        .doc("Which documents the tables are about; use validation while choosing settings");
    return s;
  }();
  return schema;
}

Violation cross_check(const FederatedConfig& c) {
  if (c.domains.empty()) return "domains must not be empty";
  std::set<std::string> names;
  for (const auto& domain : c.domains)
    if (!names.insert(domain.name).second) return fmt::format("domain '{}' stands twice", domain.name);
  if (c.clients.partition == "domain" && c.clients.count < static_cast<int64_t>(c.domains.size()))
    return fmt::format("clients.partition domain needs at least one client per domain: {} clients, {} domains",
                       c.clients.count, c.domains.size());
  return std::nullopt;
}

}  // namespace

const core::Schema<ServerConfig>& server_schema() {
  using C = ServerConfig;
  static const auto schema = [] {
    core::Schema<C> s;
    s.field("optimizer", &C::optimizer)
        .choices({"fedavg", "fedavgm", "fedadagrad", "fedadam", "fedyogi"})
        .doc("How the averaged change moves the global adapter")
        .field("learning_rate", &C::learning_rate)
        .above(0)
        .doc("fedadagrad, fedadam, fedyogi: eta")
        .field("beta1", &C::beta1)
        .min(0)
        .max(0.9999999)
        .doc("fedavgm, fedadam, fedyogi: decay of the mean change")
        .field("beta2", &C::beta2)
        .min(0)
        .max(0.9999999)
        .doc("fedadam, fedyogi: decay of the squared change")
        .field("tau", &C::tau)
        .above(0)
        .doc(
            "fedadagrad, fedadam, fedyogi: added to the root of the squared change, which starts at tau^2; smaller "
            "moves rarely changed "
            "entries more");
    return s;
  }();
  return schema;
}

const core::Schema<PruningConfig>& pruning_schema() {
  using C = PruningConfig;
  static const auto schema = [] {
    core::Schema<C> s;
    s.field("gamma", &C::gamma)
        .above(0)
        .max(1)
        .doc("hetlora: a client's tail starts at floor(gamma * rank), and it is cut there when it shrank")
        .field("lambda", &C::lambda)
        .min(0)
        .doc("hetlora: weight of the tail's norm in the local loss; 0 = no pull towards smaller ranks")
        .field("min_rank", &C::min_rank)
        .min(1)
        .doc("hetlora: ranks are not cut below this");
    return s;
  }();
  return schema;
}

const core::Schema<FederatedConfig>& federated_schema() {
  using C = FederatedConfig;
  static const auto schema = [] {
    core::Schema<C> s;
    add_run_fields(s);
    s.object("model", &C::model, model_schema())
        .doc("The frozen model")
        .list("domains", &C::domains, domain_schema())
        .doc("Text that the clients share out among themselves")
        .field("seq_len", &C::seq_len)
        .min(2)
        .doc("Context of training and evaluation")
        .unit("tokens")
        .field("tokenizer", &C::tokenizer)
        .doc("Tokeniser the data must have been prepared with")
        .object("clients", &C::clients, clients_schema())
        .doc("Who takes part")
        .field("rounds", &C::rounds)
        .min(1)
        .doc("Aggregations")
        .object("lora", &C::lora, adapters::adapter_schema())
        .doc(
            "The adapter, of any type but those that start from examples; its scale alpha / rank holds for clients of "
            "any rank")
        .object("train", &C::train, train_schema())
        .doc("Training of one client in one round; optimiser state starts anew every round")
        .object("server", &C::server, server_schema())
        .doc("Server step")
        .object("pruning", &C::pruning, pruning_schema())
        .doc("How ranks shrink (hetlora)")
        .field("comparisons", &C::comparisons)
        .choices({"centralised", "alone"})
        .evaluation_only()
        .unique()
        .doc(
            "centralised: one adapter on all data, as many sequences as all clients together; alone: every client by "
            "itself for as many steps as in the federation")
        .object("evaluation", &C::evaluation, evaluation_schema())
        .doc("What is measured")
        .check(cross_check);
    return s;
  }();
  return schema;
}

}  // namespace moraine::algorithms::federated
