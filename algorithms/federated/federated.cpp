#include "algorithms/federated/federated.h"

#include <algorithm>
#include <cmath>
#include <set>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>

#include "algorithms/adapters/adapter.h"
#include "algorithms/federated/global_adapter.h"
#include "algorithms/language_model.h"
#include "core/error.h"
#include "data/model_tokenizer.h"
#include "data/text_dataset.h"
#include "models/checkpoint.h"
#include "models/decoder.h"

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

Federated::~Federated() = default;

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
    // The adapter's targets, ranks and options are checked against the model once, here, before anything is planned.
    const adapters::AdapterConfig widest = at_rank(config_.lora, server_rank());
    (void)adapters::parametrisation(widest.type)
        .count(adapters::targets_of(widest, models::decoder_slots(architecture_)), widest);
  }
  problems.throw_if_any(config_.name);
}

const models::Decoder& Federated::base() const {
  std::call_once(base_once_, [this] {
    base_ = std::make_unique<models::Decoder>(models::Decoder::from_directory(config_.model.path, std::nullopt));
  });
  return *base_;
}

adapters::Adapter Federated::last_adapter(const RunState& state, const Stages& stages) const {
  std::vector<core::ArtefactPtr> known;
  if (stages.start) known.push_back(state.artefact(*stages.start));
  known.push_back(state.artefact(stages.rounds.back().state));
  return adapter_after(global_adapter(), server_rank(), known, base(), at::kCPU);
}

void Federated::write_merged_model(const RunState& state, const Stages& stages,
                                   const std::filesystem::path& directory) const {
  const at::NoGradGuard no_grad;
  std::map<std::string, at::Tensor> deltas;
  if (federation_->changes_base())
    for (const auto& round : stages.rounds) add_base_change(state.artefact(round.state), deltas);
  if (!federation_->starts_fresh())  // the adapter of the last round sits on top
    for (const auto& [weight, change] : last_adapter(state, stages).deltas(base())) {
      at::Tensor& delta = deltas[weight];
      delta = delta.defined() ? delta + change : change;
    }
  const auto merged = base().plus({deltas.begin(), deltas.end()});
  write_model_directory(directory, architecture_.to_json(), {merged.weights().begin(), merged.weights().end()});
  models::copy_companions(config_.model.path, directory);
}

void Federated::publish(const RunState& state, const std::filesystem::path& run_directory) const {
  PlanBuilder builder(state);
  const Stages stages = walk(builder);
  if (stages.rounds.empty()) return;
  if (federation_->changes_base()) return write_merged_model(state, stages, run_directory / "merged_model");
  if (adapters::parametrisation(config_.lora.type).in_peft(config_.lora))
    last_adapter(state, stages).save(run_directory / "experts" / "global", config_.model.path);
}

void Federated::export_as(const RunState& state, const ExportRequest& request) const {
  PlanBuilder builder(state);
  const Stages stages = walk(builder);
  if (stages.rounds.empty())
    throw core::UserError("algorithms/federated: no round is complete yet", "finish the run, then export");
  if (!request.what.empty() || !request.experts.empty())
    throw core::UserError(fmt::format("algorithms/federated: {} has one result, the global model", method_),
                          "leave out the names of results and experts");
  if (request.format == "hf") return write_merged_model(state, stages, request.directory);
  if (request.format != "peft")
    throw core::UserError(fmt::format("algorithms/federated: {} has no form '{}'", method_, request.format),
                          "--to hf: the merged model; --to peft: the adapter");
  if (federation_->changes_base())
    throw core::UserError(
        fmt::format("algorithms/federated: {} changes the base model every round: its result is no single adapter",
                    method_),
        "--to hf writes the merged model");
  last_adapter(state, stages)
      .save(request.directory, request.base_model.empty() ? config_.model.path : request.base_model);
}

double Federated::numbers_sent_per_turn(const std::map<int64_t, int64_t>& added) const {
  const auto seed = static_cast<uint64_t>(config_.seed);
  const auto clients = partition({}, config_.clients, seed);
  std::vector<size_t> seen(clients.size());  // rounds whose change of the base a client has
  std::vector<int64_t> until = {0};          // numbers in the changes of rounds 0..t - 1
  int64_t sent = 0, turns = 0;
  for (int64_t t = 0; t < config_.rounds; ++t) {
    int64_t sum = 0;
    for (const size_t k : sample_clients(clients, config_.clients.per_round, t, seed)) {
      if (t > 0) sent += until.back() - until[seen[k]], ++turns;
      seen[k] = static_cast<size_t>(t);
      sum += added.at(clients[k].rank ? clients[k].rank : config_.lora.rank);
    }
    until.push_back(until.back() + sum);
  }
  return turns == 0 ? static_cast<double>(until.back()) : static_cast<double>(sent) / static_cast<double>(turns);
}

ParameterTable Federated::parameters() const {
  const at::NoGradGuard no_grad;
  const auto model = models::Decoder::from_config(architecture_, 0, at::kFloat);
  const adapters::Parametrisation& type = adapters::parametrisation(config_.lora.type);
  ParameterTable table;
  table.columns = {"rank", "adapter parameters", "% of the model", "up per client and round, numbers",
                   "down per client and round, numbers"};
  std::set<int64_t> ranks(config_.clients.ranks.begin(), config_.clients.ranks.end());
  if (ranks.empty()) ranks = {config_.lora.rank};
  std::map<int64_t, int64_t> up, added;
  int64_t kept = 0, targets = 0;
  for (const int64_t rank : ranks) {
    const auto config = at_rank(config_.lora, rank);
    const auto adapter = adapters::Adapter::blank(config, model, 0, at::kCPU);
    for (const auto& [name, tensor] : sent_tensors(adapter)) up[rank] += tensor.numel();
    if (federation_->changes_base())
      added[rank] = federation_->numbers_added(changes_of(config, 0, tensors_of(adapter), model));
    if (global_adapter().start) kept = type.count(adapter.targets(), config).stored;
    targets = static_cast<int64_t>(adapter.targets().size());
  }
  const int64_t changes = federation_->changes_base() ? std::llround(numbers_sent_per_turn(added)) : 0;
  for (const int64_t rank : ranks) {
    const auto config = at_rank(config_.lora, rank);
    const auto trained = type.count(adapters::targets_of(config, model.slots()), config).trained;
    table.rows.push_back({type.traits().uses_rank ? core::Json(rank) : core::Json("none"), trained,
                          100.0 * static_cast<double>(trained) / static_cast<double>(architecture_.total_parameters()),
                          up.at(rank), (federation_->starts_fresh() ? 0 : up.at(rank)) + changes});
  }
  const int64_t sampled = config_.clients.per_round ? config_.clients.per_round : config_.clients.count;
  table.notes = {fmt::format("{} adapted modules, {} clients per round; a number is 4 bytes", targets, sampled)};
  if (kept > 0)
    table.notes.push_back(
        fmt::format("down, before a client's first turn: the adapter as it starts, {} numbers", kept));
  if (federation_->changes_base())
    table.notes.push_back(fmt::format(
        "down: every change of the base since a client's last turn, {} numbers in the mean over turns", changes));
  return table;
}

namespace {

// What the method, rounds as such and the ranks of clients mind about the adapter.
void check_adapter(const FederatedConfig& config, const Federation& federation, const core::Origin& origin,
                   core::Problems& problems) {
  const adapters::AdapterConfig& adapter = config.lora;
  const adapters::Parametrisation& type = adapters::parametrisation(adapter.type);
  if (type.wants(adapter) != adapters::Wants::kNothing)
    problems.add(
        origin, "lora.type",
        fmt::format("this adapter of type {} starts from examples: the server has none, and a client's would tell of "
                    "its data",
                    adapter.type),
        "use it with method: finetune, or choose another type, init or mask");
  else if (const auto refusal = federation.refusal(adapter))
    problems.add(origin, "lora.type", refusal->why, refusal->hint);
  const bool ranks_differ = !config.clients.ranks.empty() || federation.prunes();
  if (ranks_differ && (!adapter.rank_pattern.empty() || !adapter.alpha_pattern.empty()))
    problems.add(origin, "lora.rank_pattern", "clients of different ranks have one rank in all modules",
                 "leave rank_pattern and alpha_pattern out");
  if (!ranks_differ) return;
  std::set<int64_t> ranks(config.clients.ranks.begin(), config.clients.ranks.end());
  if (federation.prunes()) ranks.insert(config.pruning.min_rank);
  for (const int64_t rank : ranks) {
    const auto why = type.traits().uses_rank ? type.problem(at_rank(adapter, rank))
                                             : fmt::format("type {} has no rank", adapter.type);
    if (why) problems.add(origin, "clients.ranks", fmt::format("at rank {}: {}", rank, *why), "choose other ranks");
  }
}

}  // namespace

ParsedRecipe parse_recipe(const core::ConfigNode& root, core::Problems& problems, const char* name,
                          std::unique_ptr<Federation> federation) {
  FederatedConfig config;
  federated_schema().parse(root, "", config, problems);
  const bool parsed = problems.empty();
  ParsedRecipe recipe;
  recipe.run = config;
  federated_schema().resolve(root, "", config, recipe.resolved);
  recipe.values = federated_schema().to_json(config);
  const auto origin = [&](const char* key) -> core::Origin {
    return root.find(key) ? root.find(key)->origin : root.origin;
  };
  if (!federation->mixed_ranks() && !config.clients.ranks.empty())
    problems.add(origin("clients"), "clients.ranks", fmt::format("{} needs one rank for all clients", name),
                 "use flexlora, flora or hetlora for clients of different ranks");
  if (!federation->server_optimizers() && config.server.optimizer != "fedavg")
    problems.add(origin("server"), "server.optimizer",
                 fmt::format("{} forms an exact mean: {} would undo it", name, config.server.optimizer),
                 "server.optimizer: fedavg");
  if (!federation->weighs_as_told() && config.clients.weighting != "samples")
    problems.add(origin("clients"), "clients.weighting",
                 fmt::format("{} weighs contributions by the norm of their update", name),
                 "leave clients.weighting out");
  if (federation->starts_fresh() && config.clients.proximal != 0)
    problems.add(origin("clients"), "clients.proximal",
                 fmt::format("{} starts every round afresh: there is no global adapter to stay near", name),
                 "leave clients.proximal out");
  if (!federation->prunes() && pruning_schema().to_json(config.pruning) != pruning_schema().to_json({}))
    problems.add(origin("pruning"), "pruning", fmt::format("ranks do not shrink in {}", name),
                 "use hetlora, or leave pruning out");
  if (parsed) check_adapter(config, *federation, origin("lora"), problems);
  if (problems.empty()) recipe.method = std::make_unique<Federated>(name, std::move(federation), std::move(config));
  return recipe;
}

}  // namespace moraine::algorithms::federated
