// What a federation wants done: rounds, each a fan-out over the sampled clients and one aggregation; evaluations of
// every round's model run beside the next round. One pure walk over the accepted results.
#include <algorithm>
#include <cmath>

#include "algorithms/federated/federated.h"
#include "core/error.h"
#include "core/hash.h"

namespace moraine::algorithms::federated {
namespace {

// Bumped when a change of the code changes results for the same spec.
constexpr int kResultVersion = 1;

}  // namespace

const DomainConfig& Federated::domain(const std::string& name) const {
  const auto it =
      std::find_if(config_.domains.begin(), config_.domains.end(), [&](const auto& d) { return d.name == name; });
  MORAINE_CHECK(it != config_.domains.end(), "no domain {}", name);
  return *it;
}

core::Json Federated::data_spec(const std::string& name, const std::string& split) const {
  return {{"name", name},
          {"fingerprint", fingerprints_.at(name)},
          {"split", split},
          {"seq_len", config_.seq_len},
          {"tokenizer", config_.tokenizer}};
}

int64_t Federated::server_rank() const {
  return config_.clients.ranks.empty() ? config_.lora.rank
                                       : *std::max_element(config_.clients.ranks.begin(), config_.clients.ranks.end());
}

adapters::LoraConfig Federated::lora(int64_t rank) const {
  adapters::LoraConfig lora = config_.lora;
  lora.rank = rank;
  lora.alpha = scale() * (lora.use_rslora ? std::sqrt(static_cast<double>(rank)) : static_cast<double>(rank));
  return lora;
}

double Federated::scale() const {
  const auto rank = static_cast<double>(config_.lora.rank);
  return config_.lora.alpha / (config_.lora.use_rslora ? std::sqrt(rank) : rank);
}

std::vector<Client> Federated::clients() const {
  std::vector<std::pair<std::string, int64_t>> sizes;
  for (const auto& d : config_.domains) sizes.emplace_back(d.name, sequences_.at(d.name));
  auto clients = partition(sizes, config_.clients, static_cast<uint64_t>(config_.seed));
  for (auto& client : clients)
    if (client.rank == 0) client.rank = config_.lora.rank;
  return clients;
}

Unit Federated::make_unit(const std::string& kind, const std::string& label, core::Json spec,
                          std::vector<std::string> inputs, double cost) const {
  spec["method"] = method_;
  spec["version"] = kResultVersion;
  spec.update(compute_identity(config_.workers));
  spec["dtype"] = config_.train.dtype;
  spec["base"] = model_id_;
  return {kind, label, std::move(spec), std::move(inputs), Place::kWorker, cost};
}

Unit Federated::update_unit(const std::string& label, const Client& client, int64_t round, int64_t steps, int64_t rank,
                            std::vector<std::string> inputs) const {
  TrainConfig train = config_.train;
  train.steps = steps;
  train.warmup_steps = std::min(train.warmup_steps, steps);
  core::Json data = core::Json::object();
  for (const auto& [name, share] : client.shares) data[name] = data_spec(name, "train");
  core::Json spec = {{"client", client.name},
                     {"round", round},
                     {"shares", client.to_json()},
                     {"data", data},
                     {"rank", rank},
                     {"server_rank", server_rank()},
                     {"lora", adapters::lora_schema().to_json(config_.lora)},
                     {"train", train_identity(train)},
                     {"log_every", train.log_every},
                     {"seed", config_.seed},
                     {"tolerant", config_.clients.min_per_round > 0}};
  if (federation_->mixed_ranks()) {
    const core::Json pruning = federated_schema().to_json(config_).at("pruning");
    spec["pruning"] = pruning;
  }
  const double parameters = static_cast<double>(architecture_.total_parameters());
  // The frozen weights take no gradients: 4 instead of 6 operations per parameter and token.
  return make_unit("client_update", label, std::move(spec), std::move(inputs),
                   4 * parameters * static_cast<double>(steps * train.batch_size * config_.seq_len));
}

Unit Federated::evaluation_unit(const std::string& label, const std::string& name,
                                std::vector<std::string> inputs) const {
  const int64_t sequences = config_.evaluation.sequences;
  core::Json spec = {{"data", data_spec(name, config_.evaluation.split)},
                     {"sequences", sequences},
                     {"batch_size", config_.evaluation.batch_size},
                     {"lora", adapters::lora_schema().to_json(config_.lora)},
                     {"seed", config_.seed},
                     {"server_rank", server_rank()}};
  const double tokens = static_cast<double>((sequences ? sequences : 512) * config_.seq_len);
  return make_unit("evaluate", label, std::move(spec), std::move(inputs),
                   2 * static_cast<double>(architecture_.total_parameters()) * tokens);
}

std::map<std::string, std::string> Federated::evaluate_everywhere(PlanBuilder& plan, const std::string& label,
                                                                  const std::vector<std::string>& inputs) const {
  std::map<std::string, std::string> tests;
  for (const auto& d : config_.domains)
    if (const auto id = plan.need(evaluation_unit(fmt::format("{}/{}", label, d.name), d.name, inputs)))
      tests[d.name] = *id;
  return tests;
}

std::vector<std::string> Federated::model_inputs(const std::vector<RoundResult>& rounds) const {
  std::vector<std::string> inputs;
  if (federation_->changes_base()) {
    for (const auto& round : rounds) inputs.push_back(round.state);
  } else if (!rounds.empty()) {
    inputs.push_back(rounds.back().state);
  }
  return inputs;
}

Federated::Stages Federated::walk(PlanBuilder& plan) const {
  Stages s;
  const std::vector<Client> clients = this->clients();
  std::map<std::string, int64_t> ranks;  // HetLoRA: as the last contribution says
  for (const auto& client : clients) ranks[client.name] = client.rank;

  s.base = evaluate_everywhere(plan, "test/base", {});
  const auto compared = [&](const char* name) {
    return std::find(config_.comparisons.begin(), config_.comparisons.end(), name) != config_.comparisons.end();
  };
  if (compared("centralised")) {
    Client everybody{"everybody", {}, config_.lora.rank};
    for (const auto& [name, count] : sequences_) everybody.shares[name] = {0, count};
    const int64_t sampled = config_.clients.per_round ? config_.clients.per_round : config_.clients.count;
    Unit unit = update_unit("train/centralised", everybody, 0, config_.train.steps * config_.rounds * sampled,
                            config_.lora.rank, {});
    unit.spec["tolerant"] = false;
    s.centralised = plan.need(std::move(unit));
    if (s.centralised) s.centralised_tests = evaluate_everywhere(plan, "test/centralised", {*s.centralised});
  }
  if (compared("alone"))
    for (const auto& client : clients) {
      Unit unit =
          update_unit("train/alone/" + client.name, client, 0, config_.train.steps * config_.rounds, client.rank, {});
      unit.spec["tolerant"] = false;
      if (const auto id = plan.need(std::move(unit)))
        s.alone_tests[client.name] = evaluate_everywhere(plan, "test/alone/" + client.name, {*id});
    }

  const auto digits = fmt::formatted_size("{}", config_.rounds);
  for (int64_t t = 0; t < config_.rounds; ++t) {
    const std::string label = fmt::format("{:0{}}", t + 1, digits);
    const std::vector<std::string> model = model_inputs(s.rounds);
    RoundResult round;
    core::Json names = core::Json::array();
    const auto sampled = sample_clients(clients, config_.clients.per_round, t, static_cast<uint64_t>(config_.seed));
    for (const size_t k : sampled) {
      const Client& client = clients[k];
      const int64_t rank = ranks.at(client.name);
      std::vector<std::string> inputs = model;
      // What is sent is what a client needs: its own rank, without the server's moments.
      if (!inputs.empty() && (rank < server_rank() || config_.server.optimizer != "fedavg") &&
          !federation_->starts_fresh()) {
        Unit unit = make_unit("broadcast", fmt::format("broadcast/{}/r{}", label, rank), {{"rank", rank}},
                              {inputs.back()}, 1e6);
        unit.place = Place::kCoordinator;
        const auto id = plan.need(std::move(unit));
        if (!id) continue;
        inputs.back() = *id;
      }
      if (!inputs.empty()) round.sent.push_back(inputs.back());
      Unit unit = update_unit(fmt::format("train/{}/{}", label, client.name), client, t, config_.train.steps, rank,
                              std::move(inputs));
      unit.follows = unit.cost * static_cast<double>(config_.rounds - 1 - t);
      if (const auto id = plan.need(std::move(unit))) {
        round.updates.push_back(*id);
        names.push_back(client.name);
      }
    }
    if (round.updates.size() != sampled.size()) return s;
    if (federation_->mixed_ranks())
      for (size_t i = 0; i < sampled.size(); ++i) {
        const auto& meta = plan.state().artefact(round.updates[i])->meta();
        if (!meta.contains("refused")) ranks[clients[sampled[i]].name] = meta.at("rank").get<int64_t>();
      }

    core::Json spec = {{"clients", names},
                       {"round", t},
                       {"weighting", config_.clients.weighting},
                       {"min_per_round", config_.clients.min_per_round},
                       {"server", federated_schema().to_json(config_).at("server")},
                       {"lora", adapters::lora_schema().to_json(config_.lora)},
                       {"server_rank", server_rank()},
                       {"seed", config_.seed},
                       {"has_state", !s.rounds.empty()}};
    std::vector<std::string> inputs;
    if (!s.rounds.empty()) inputs.push_back(s.rounds.back().state);
    inputs.insert(inputs.end(), round.updates.begin(), round.updates.end());
    Unit unit = make_unit("aggregate", "aggregate/" + label, std::move(spec), std::move(inputs), 1e6);
    unit.place = Place::kCoordinator;
    const auto state = plan.need(std::move(unit));
    if (!state) return s;
    round.state = *state;
    s.rounds.push_back(std::move(round));
    if ((t + 1) % config_.evaluation.every == 0 || t + 1 == config_.rounds)
      s.rounds.back().tests = evaluate_everywhere(plan, "test/" + label, model_inputs(s.rounds));
  }
  return s;
}

Plan Federated::plan(const RunState& state) const {
  PlanBuilder builder(state);
  walk(builder);
  return builder.finish();
}

}  // namespace moraine::algorithms::federated
