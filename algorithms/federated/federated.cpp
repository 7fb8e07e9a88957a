#include "algorithms/federated/federated.h"

#include <algorithm>
#include <cmath>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>

#include "algorithms/adapters/adapter.h"
#include "algorithms/federated/factors.h"
#include "algorithms/language_model.h"
#include "core/error.h"
#include "data/model_tokenizer.h"
#include "data/text_dataset.h"
#include "models/checkpoint.h"
#include "models/decoder.h"
#include "models/tensor_io.h"

namespace moraine::algorithms::federated {

Federated::Federated(std::string method, std::unique_ptr<Federation> federation, FederatedConfig config)
    : method_(std::move(method)),
      federation_(std::move(federation)),
      config_(std::move(config)),
      architecture_(models::DecoderConfig::from_directory(config_.model.path)) {}

Federated::Federated(std::string method, std::unique_ptr<Federation> federation, FederatedConfig config,
                     const core::Json& inputs)
    : method_(std::move(method)),
      federation_(std::move(federation)),
      config_(std::move(config)),
      architecture_(models::DecoderConfig::from_json(inputs.at("architecture"), "recorded inputs")),
      fingerprints_(inputs.at("fingerprints").get<std::map<std::string, std::string>>()),
      sequences_(inputs.at("sequences").get<std::map<std::string, int64_t>>()),
      model_id_(inputs.at("model").get<std::string>()) {
  share_out();
}

core::Json Federated::inputs() const {
  return {{"architecture", architecture_.to_json()},
          {"fingerprints", fingerprints_},
          {"sequences", sequences_},
          {"model", model_id_}};
}

void Federated::open_inputs() {
  core::Problems problems;
  for (size_t i = 0; i < config_.domains.size(); ++i) {
    const auto& d = config_.domains[i];
    const std::string key = fmt::format("domains.{}.path", i);
    try {
      for (const char* split : {"train", "validation", "test"}) {
        const auto dataset = data::TextDataset::open(d.path, split, config_.seq_len, config_.tokenizer);
        fingerprints_[d.name] = dataset.info().fingerprint;
        if (split == std::string("train")) sequences_[d.name] = dataset.num_sequences();
        data::check_model_tokenizer(dataset.info(), d.path, config_.model.path, architecture_.vocab_size);
      }
    } catch (const core::UserError& error) {
      problems.add(key, key, error.what(), error.hint());
    }
  }
  if (config_.seq_len > architecture_.max_position_embeddings)
    problems.add("seq_len", "seq_len",
                 fmt::format("{} is more than the model's {} positions", config_.seq_len,
                             architecture_.max_position_embeddings));
  if (problems.empty()) {
    std::string empty;
    int64_t count = 0;
    share_out();
    for (const auto& client : clients_)
      if (client.sequences() == 0) {
        if (++count <= 5) empty += (empty.empty() ? "" : ", ") + client.name;
      }
    if (count > 0)
      problems.add("clients", "clients",
                   fmt::format("{} of {} clients have no data: {}{}", count, config_.clients.count, empty,
                               count > 5 ? ", ..." : ""),
                   "fewer clients, a larger clients.alpha, another seed, or more text");
  }
  if (problems.empty()) {
    model_id_ = model_identity(config_.model.path, architecture_.to_json());
    // The adapter's targets and ranks are checked against the model once, here, before anything is planned.
    const auto base = models::Decoder::from_directory(config_.model.path, std::nullopt);
    (void)adapters::targets_of(at_rank(config_.lora, server_rank()), base.slots());
  }
  problems.throw_if_any(config_.name);
}

void Federated::write_adapter(const RunState& state, const std::string& id, const ExportRequest& request) const {
  const at::NoGradGuard no_grad;
  const auto base = models::Decoder::from_directory(config_.model.path, std::nullopt);
  const GlobalAdapter global{config_.lora, server_rank(), config_.seed};
  const auto adapter = adapters::Adapter::create(at_rank(config_.lora, server_rank()), base.slots(), 0, at::kCPU);
  Factors factors = first_factors(global, base.slots());
  for (const auto& view : state.artefact(id)->file().tensors())
    if (factors.count(view.name)) factors[view.name] = models::copy_of(view);
  set_factors(adapter, factors);
  adapter.save(request.directory, request.base_model.empty() ? config_.model.path : request.base_model);
}

void Federated::write_merged_model(const RunState& state, const std::vector<RoundResult>& rounds,
                                   const std::filesystem::path& directory) const {
  const at::NoGradGuard no_grad;
  const auto base = models::Decoder::from_directory(config_.model.path, std::nullopt);
  std::map<std::string, at::Tensor> deltas;
  const auto add = [&](const std::string& slot, const at::Tensor& b, const at::Tensor& a, double factor) {
    at::Tensor& delta = deltas[slot + ".weight"];
    const at::Tensor product = b.matmul(a) * factor;
    delta = delta.defined() ? delta + product : product;
  };
  for (const auto& round : rounds) {
    const auto artefact = state.artefact(round.state);
    for (const auto& view : artefact->file().tensors())
      if (view.name.ends_with(".base_A")) {
        const std::string slot = view.name.substr(0, view.name.size() - 7);
        add(slot, models::copy_of(*artefact->file().find(slot + ".base_B")), models::copy_of(view), 1);
      }
  }
  if (!federation_->starts_fresh()) {  // the adapter of the last round sits on top
    Factors factors = first_factors({config_.lora, server_rank(), config_.seed}, base.slots());
    for (const auto& view : state.artefact(rounds.back().state)->file().tensors())
      if (factors.count(view.name)) factors[view.name] = models::copy_of(view);
    for (const auto& [name, a] : factors)
      if (name.ends_with(".lora_A.weight")) {
        const std::string slot = name.substr(0, name.size() - 14);
        add(slot, factors.at(slot + ".lora_B.weight"), a, scale_of(config_.lora));
      }
  }
  const auto merged = base.plus({deltas.begin(), deltas.end()});
  write_model_directory(directory, architecture_.to_json(), {merged.weights().begin(), merged.weights().end()});
  models::copy_companions(config_.model.path, directory);
}

void Federated::publish(const RunState& state, const std::filesystem::path& run_directory) const {
  PlanBuilder builder(state);
  const Stages stages = walk(builder);
  if (stages.rounds.empty()) return;
  if (federation_->changes_base()) return write_merged_model(state, stages.rounds, run_directory / "merged_model");
  ExportRequest global;
  global.directory = run_directory / "experts" / "global";
  write_adapter(state, stages.rounds.back().state, global);
}

void Federated::export_as(const RunState& state, const ExportRequest& request) const {
  PlanBuilder builder(state);
  const Stages stages = walk(builder);
  if (stages.rounds.empty())
    throw core::UserError("algorithms/federated: no round is complete yet", "finish the run, then export");
  if (!request.what.empty() || !request.experts.empty())
    throw core::UserError(fmt::format("algorithms/federated: {} has one result, the global model", method_),
                          "leave out the names of results and experts");
  if (request.format == "hf") return write_merged_model(state, stages.rounds, request.directory);
  if (request.format != "peft")
    throw core::UserError(fmt::format("algorithms/federated: {} has no form '{}'", method_, request.format),
                          "--to hf: the merged model; --to peft: the adapter");
  if (federation_->changes_base())
    throw core::UserError(
        fmt::format("algorithms/federated: {} changes the base model every round: its result is no single adapter",
                    method_),
        "--to hf writes the merged model");
  write_adapter(state, stages.rounds.back().state, request);
}

double Federated::ranks_sent_per_turn() const {
  const auto seed = static_cast<uint64_t>(config_.seed);
  const auto clients = partition({}, config_.clients, seed);
  std::vector<size_t> seen(clients.size());  // rounds whose change of the base a client has
  std::vector<int64_t> ranks_until = {0};    // sums of the ranks of rounds 0..t - 1
  int64_t sent = 0, turns = 0;
  for (int64_t t = 0; t < config_.rounds; ++t) {
    int64_t sum = 0;
    for (const size_t k : sample_clients(clients, config_.clients.per_round, t, seed)) {
      if (t > 0) sent += ranks_until.back() - ranks_until[seen[k]], ++turns;
      seen[k] = static_cast<size_t>(t);
      sum += clients[k].rank ? clients[k].rank : config_.lora.rank;
    }
    ranks_until.push_back(ranks_until.back() + sum);
  }
  return turns == 0 ? static_cast<double>(ranks_until.back()) : static_cast<double>(sent) / static_cast<double>(turns);
}

ParameterTable Federated::parameters() const {
  const auto model = models::Decoder::from_config(architecture_, 0, at::kFloat);
  const auto targets = adapters::targets_of(config_.lora, model.slots());
  const int64_t sampled = config_.clients.per_round ? config_.clients.per_round : config_.clients.count;
  ParameterTable table;
  table.columns = {"rank", "adapter parameters", "% of the model", "up per client and round, numbers",
                   "down per client and round, numbers"};
  std::vector<int64_t> ranks =
      config_.clients.ranks.empty() ? std::vector<int64_t>{config_.lora.rank} : config_.clients.ranks;
  const int64_t sent_ranks = std::llround(ranks_sent_per_turn());
  std::sort(ranks.begin(), ranks.end());
  ranks.erase(std::unique(ranks.begin(), ranks.end()), ranks.end());
  for (const int64_t rank : ranks) {
    int64_t count = 0, up = 0, down = 0;
    for (const auto& target : targets) {
      const auto traffic = federation_->traffic(target.slot.in, target.slot.out, rank, sent_ranks, server_rank());
      count += rank * (target.slot.in + target.slot.out);
      up += traffic.up;
      down += traffic.down;
    }
    table.rows.push_back({rank, count,
                          100.0 * static_cast<double>(count) / static_cast<double>(architecture_.total_parameters()),
                          up, down});
  }
  table.notes = {
      fmt::format("{} adapted matrices, {} clients per round; a number is 4 bytes", targets.size(), sampled)};
  if (federation_->changes_base())
    table.notes.push_back(fmt::format(
        "down: every change of the base since a client's last turn, of rank {} in the mean over turns", sent_ranks));
  return table;
}

ParsedRecipe parse_recipe(const core::ConfigNode& root, core::Problems& problems, const char* name,
                          std::unique_ptr<Federation> federation) {
  FederatedConfig config;
  federated_schema().parse(root, "", config, problems);
  ParsedRecipe recipe;
  recipe.run = config;
  federated_schema().resolve(root, "", config, recipe.resolved);
  recipe.values = federated_schema().to_json(config);
  const auto origin = [&](const char* key) { return root.find(key) ? root.find(key)->origin : root.origin; };
  if (!federation->mixed_ranks() && !config.clients.ranks.empty())
    problems.add(origin("clients"), "clients.ranks", fmt::format("{} needs one rank for all clients", name),
                 "use flora or hetlora for clients of different ranks");
  if (!federation->server_optimizers() && config.server.optimizer != "fedavg")
    problems.add(origin("server"), "server.optimizer",
                 fmt::format("{} forms an exact mean: {} would undo it", name, config.server.optimizer),
                 "server.optimizer: fedavg");
  if (!federation->weighs_as_told() && config.clients.weighting != "samples")
    problems.add(origin("clients"), "clients.weighting",
                 fmt::format("{} weighs contributions by the norm of their update", name),
                 "leave clients.weighting out");
  if (!federation->prunes() && pruning_schema().to_json(config.pruning) != pruning_schema().to_json({}))
    problems.add(origin("pruning"), "pruning", fmt::format("ranks do not shrink in {}", name),
                 "use hetlora, or leave pruning out");
  if (config.lora.lr_ratio != 1)
    problems.add(origin("lora"), "lora.lr_ratio", "clients of a federation train all factors at one rate",
                 "leave it out");
  if (config.lora.type != "lora" || adapters::starts_from_base(config.lora))
    problems.add(origin("lora"), "lora.type", "rounds are of pairs A and B that start apart from the base",
                 "type: lora with init: kaiming or gaussian");
  if (!config.lora.rank_pattern.empty() || !config.lora.alpha_pattern.empty())
    problems.add(origin("lora"), "lora.rank_pattern", "ranks per module are not federated",
                 "one lora.rank, and clients.ranks for clients of different ranks");
  if (problems.empty()) recipe.method = std::make_unique<Federated>(name, std::move(federation), std::move(config));
  return recipe;
}

}  // namespace moraine::algorithms::federated
