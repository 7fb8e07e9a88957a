// What a federation wants done: rounds, each a fan-out over the sampled clients and one aggregation; evaluations of
// every round's model run beside the next round. One pure walk over the accepted results.
#include <algorithm>

#include "algorithms/federated/federated.h"
#include "algorithms/federated/global_adapter.h"
#include "algorithms/federated/units.h"
#include "core/error.h"

namespace moraine::algorithms::federated {

TextSpec Federated::text_spec(const std::string& name, const std::string& split) const {
  return {name, fingerprints_.at(name), split, config_.seq_len, config_.tokenizer};
}

int64_t Federated::server_rank() const {
  return config_.clients.ranks.empty() ? config_.lora.rank
                                       : *std::max_element(config_.clients.ranks.begin(), config_.clients.ranks.end());
}

void Federated::share_out() {
  std::vector<std::pair<std::string, int64_t>> sizes;
  for (const auto& d : config_.domains) sizes.emplace_back(d.name, sequences_.at(d.name));
  clients_ = partition(sizes, config_.clients, static_cast<uint64_t>(config_.seed));
  for (auto& client : clients_)
    if (client.rank == 0) client.rank = config_.lora.rank;
}

GlobalAdapter Federated::global_adapter() const {
  return {.lora = config_.lora,
          .rank = server_rank(),
          .seed = config_.seed,
          .type_version = adapters::parametrisation(config_.lora.type).result_version(),
          .start = !federation_->starts_fresh() && starts_from_weights(config_.lora)};
}

Unit Federated::update_unit(const std::string& label, const Client& client, int64_t round, int64_t steps, int64_t rank,
                            std::vector<std::string> inputs, bool in_round) const {
  TrainConfig train = config_.train;
  train.steps = steps;
  train.warmup_steps = std::min(train.warmup_steps, steps);
  UpdateSpec spec{.method = method_,
                  .method_version = federation_->result_version(),
                  .compute = compute_identity(config_.workers),
                  .base = model_id_,
                  .client = client.name,
                  .round = round,
                  .rank = rank,
                  .adapter = global_adapter(),
                  .train = train_identity(train),
                  .tolerant = in_round && config_.clients.min_per_round > 0,
                  .proximal = in_round ? config_.clients.proximal : 0};
  for (const auto& [name, share] : client.shares)
    spec.shares.push_back({text_spec(name, "train"), share.first, share.count});
  if (federation_->starts_fresh()) spec.adapter.rank = 0;
  if (federation_->prunes()) spec.pruning = config_.pruning;
  // The frozen weights take no gradients: 4 instead of 6 operations per parameter and token.
  return {UpdateSpec::kKind,
          label,
          core::to_spec(update_schema(), spec),
          std::move(inputs),
          Place::kWorker,
          4 * static_cast<double>(architecture_.total_parameters()) *
              static_cast<double>(steps * train.batch_size * config_.seq_len)};
}

Unit Federated::evaluation_unit(const std::string& label, const std::string& name,
                                std::vector<std::string> inputs) const {
  const int64_t sequences = config_.evaluation.sequences;
  EvaluateSpec spec{.compute = compute_identity(config_.workers),
                    .base = model_id_,
                    .dtype = config_.train.dtype,
                    .data = text_spec(name, config_.evaluation.split),
                    .sequences = sequences,
                    .batch_size = config_.evaluation.batch_size};
  if (!inputs.empty()) spec.adapter = global_adapter();
  const double tokens = static_cast<double>((sequences ? sequences : 512) * config_.seq_len);
  return {EvaluateSpec::kKind, label,          core::to_spec(evaluate_schema(), spec),
          std::move(inputs),   Place::kWorker, 2 * static_cast<double>(architecture_.total_parameters()) * tokens};
}

std::map<std::string, std::string> Federated::evaluate_everywhere(PlanBuilder& plan, const std::string& label,
                                                                  const std::vector<std::string>& inputs) const {
  std::map<std::string, std::string> tests;
  for (const auto& d : config_.domains) {
    const std::string name = fmt::format("{}/{}", label, d.name);
    if (const auto id = plan.need(name, [&] { return evaluation_unit(name, d.name, inputs); })) tests[d.name] = *id;
  }
  return tests;
}

std::vector<std::string> Federated::model_inputs(const Stages& s) const {
  std::vector<std::string> inputs;
  if (s.start) inputs.push_back(*s.start);
  if (federation_->changes_base()) {
    for (const auto& round : s.rounds) inputs.push_back(round.state);
  } else if (!s.rounds.empty()) {
    inputs.push_back(s.rounds.back().state);
  }
  return inputs;
}

bool Federated::walk_start(PlanBuilder& plan, Stages& s) const {
  if (!global_adapter().start) return true;
  s.start = plan.need("start", [&] {
    const StartSpec spec{.compute = compute_identity(config_.workers),
                         .base = model_id_,
                         .dtype = config_.train.dtype,
                         .adapter = global_adapter()};
    return Unit{StartSpec::kKind, "start", core::to_spec(start_schema(), spec), {}, Place::kCoordinator, 1e6};
  });
  return s.start.has_value();
}

void Federated::walk_comparisons(PlanBuilder& plan, Stages& s) const {
  const auto compared = [&](const char* name) {
    return std::find(config_.comparisons.begin(), config_.comparisons.end(), name) != config_.comparisons.end();
  };
  const std::vector<std::string> start = s.start ? std::vector{*s.start} : std::vector<std::string>{};
  const auto on_start = [&](const std::string& update) {
    std::vector<std::string> inputs = start;
    inputs.push_back(update);
    return inputs;
  };
  if (compared("centralised")) {
    Client everybody{"everybody", {}, config_.lora.rank};
    for (const auto& [name, count] : sequences_) everybody.shares[name] = {0, count};
    const int64_t sampled = config_.clients.per_round ? config_.clients.per_round : config_.clients.count;
    s.centralised = plan.need(update_unit("train/centralised", everybody, 0,
                                          config_.train.steps * config_.rounds * sampled, config_.lora.rank, start));
    if (s.centralised) s.centralised_tests = evaluate_everywhere(plan, "test/centralised", on_start(*s.centralised));
  }
  if (!compared("alone")) return;
  for (const auto& client : clients_)
    if (const auto id = plan.need(update_unit("train/alone/" + client.name, client, 0,
                                              config_.train.steps * config_.rounds, client.rank, start)))
      s.alone_tests[client.name] = evaluate_everywhere(plan, "test/alone/" + client.name, on_start(*id));
}

bool Federated::walk_clients(PlanBuilder& plan, const Stages& s, std::span<const size_t> sampled, Progress& progress,
                             const std::string& label, RoundResult& round) const {
  const auto t = static_cast<int64_t>(s.rounds.size());
  const std::vector<std::string> model = model_inputs(s);
  const size_t first_state = s.start ? 1 : 0;
  for (const size_t k : sampled) {
    const Client& client = clients_[k];
    const int64_t rank = progress.ranks[k];
    std::vector<std::string> inputs = model;
    // What is sent is what a client needs: its own rank, without the server's moments.
    if (!s.rounds.empty() && (rank < server_rank() || config_.server.optimizer != "fedavg") &&
        !federation_->starts_fresh()) {
      const std::string name = fmt::format("broadcast/{}/r{}", label, rank);
      const auto id = plan.need(name, [&] {
        return Unit{BroadcastSpec::kKind,
                    name,
                    core::to_spec(broadcast_schema(), BroadcastSpec{.rank = rank, .lora = config_.lora}),
                    {inputs.back()},
                    Place::kCoordinator,
                    1e6};
      });
      if (!id) continue;
      inputs.back() = *id;
    }
    // A client lacks the start before its first turn, and of a model whose base changes every state since its last.
    if (s.start && !progress.states[k]) round.sent.push_back(*s.start);
    const size_t known = first_state + (federation_->changes_base() ? progress.states[k].value_or(0)
                                        : s.rounds.empty()          ? 0
                                                                    : inputs.size() - first_state - 1);
    round.sent.insert(round.sent.end(), inputs.begin() + static_cast<ptrdiff_t>(known), inputs.end());
    const std::string name = fmt::format("train/{}/{}", label, client.name);
    const auto id = plan.need(name, [&] {
      Unit unit = update_unit(name, client, t, config_.train.steps, rank, std::move(inputs), /*in_round=*/true);
      unit.follows = unit.cost * static_cast<double>(config_.rounds - 1 - t);
      return unit;
    });
    if (id) round.updates.push_back(*id);
  }
  if (round.updates.size() != sampled.size()) return false;
  for (size_t i = 0; i < sampled.size(); ++i) {
    progress.states[sampled[i]] = s.rounds.size();
    if (!federation_->prunes()) continue;
    const auto& meta = plan.state().artefact(round.updates[i])->meta();
    if (!meta.contains("refused")) progress.ranks[sampled[i]] = meta.at("rank").get<int64_t>();
  }
  return true;
}

Unit Federated::aggregate_unit(const std::string& label, const Stages& s, std::span<const size_t> sampled,
                               const RoundResult& round) const {
  AggregateSpec spec{.method = method_,
                     .method_version = federation_->result_version(),
                     .compute = compute_identity(config_.workers),
                     .base = model_id_,
                     .round = static_cast<int64_t>(s.rounds.size()),
                     .weighting = config_.clients.weighting,
                     .min_per_round = config_.clients.min_per_round,
                     .server = config_.server,
                     .adapter = global_adapter(),
                     .has_state = !s.rounds.empty()};
  for (const size_t k : sampled) spec.clients.push_back({clients_[k].name, clients_[k].sequences()});
  std::vector<std::string> inputs;
  if (s.start) inputs.push_back(*s.start);
  if (!s.rounds.empty()) inputs.push_back(s.rounds.back().state);
  inputs.insert(inputs.end(), round.updates.begin(), round.updates.end());
  return {AggregateSpec::kKind, label, core::to_spec(aggregate_schema(), spec), std::move(inputs),
          Place::kCoordinator,  1e6};
}

Federated::Stages Federated::walk(PlanBuilder& plan) const {
  Stages s;
  s.base = evaluate_everywhere(plan, "test/base", {});
  if (!walk_start(plan, s)) return s;
  walk_comparisons(plan, s);
  Progress progress;
  for (const auto& client : clients_) progress.ranks.push_back(client.rank);
  progress.states.resize(clients_.size());
  const auto digits = fmt::formatted_size("{}", config_.rounds);
  for (int64_t t = 0; t < config_.rounds; ++t) {
    const std::string label = fmt::format("{:0{}}", t + 1, digits);
    const auto sampled = sample_clients(clients_, config_.clients.per_round, t, static_cast<uint64_t>(config_.seed));
    RoundResult round;
    if (!walk_clients(plan, s, sampled, progress, label, round)) return s;
    const std::string name = "aggregate/" + label;
    const auto state = plan.need(name, [&] { return aggregate_unit(name, s, sampled, round); });
    if (!state) return s;
    round.state = *state;
    s.rounds.push_back(std::move(round));
    if ((t + 1) % config_.evaluation.every == 0 || t + 1 == config_.rounds)
      s.rounds.back().tests = evaluate_everywhere(plan, "test/" + label, model_inputs(s));
  }
  return s;
}

Plan Federated::plan(const RunState& state) const {
  PlanBuilder builder(state);
  walk(builder);
  return builder.finish();
}

std::optional<std::string> Federated::missing_result(const RunState& state) const {
  PlanBuilder builder(state);
  const size_t complete = walk(builder).rounds.size();
  if (complete == static_cast<size_t>(config_.rounds)) return std::nullopt;
  return fmt::format("{} of {} rounds are complete", complete, config_.rounds);
}

}  // namespace moraine::algorithms::federated
