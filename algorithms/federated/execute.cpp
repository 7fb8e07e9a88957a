// What workers and the coordinator do in a federation: make the start, train a client, aggregate, cut what is sent,
// evaluate. A unit's specification says what; of the worker's own recipe only paths count, and how often to save and to
// log.
#include <algorithm>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/matmul.h>

#include "algorithms/adapters/adapter.h"
#include "algorithms/evaluate.h"
#include "algorithms/federated/client_data.h"
#include "algorithms/federated/federated.h"
#include "algorithms/federated/global_adapter.h"
#include "algorithms/language_model.h"
#include "core/error.h"
#include "core/hash.h"
#include "core/log.h"
#include "models/tensor_io.h"

namespace moraine::algorithms::federated {
namespace {

using core::Json;

core::ArtefactPtr write(const std::string& kind, Json meta,
                        std::initializer_list<std::reference_wrapper<const Tensors>> groups) {
  models::NamedTensors tensors;
  for (const Tensors& group : groups)
    for (const auto& [name, tensor] : group) tensors.emplace_back(name, tensor.detach().cpu());
  std::vector<at::Tensor> keep;
  return core::Artefact::create(kind, std::move(meta), models::views_of(tensors, keep));
}

// The start and the last state, of what a unit's inputs are before its `others`; none in the first round of most types.
std::vector<core::ArtefactPtr> start_and_state(const Unit& unit, const GlobalAdapter& adapter, size_t others,
                                               WorkerContext& context) {
  const size_t own = unit.inputs.size() - others;
  std::vector<core::ArtefactPtr> known;
  if (adapter.start) known.push_back(context.artefact(unit.inputs.at(0)));
  if (own > known.size()) known.push_back(context.artefact(unit.inputs.at(own - 1)));
  return known;
}

// |w - x|^2 over all that is trained.
at::Tensor distance(const Tensors& tensors, const Tensors& from) {
  at::Tensor sum;
  for (const auto& [name, tensor] : tensors) {
    if (!tensor.requires_grad()) continue;
    const at::Tensor square = (tensor - from.at(name)).square().sum();
    sum = sum.defined() ? sum + square : square;
  }
  return sum;
}

Json adapter_json(const GlobalAdapter& global, int64_t rank) {
  return adapters::adapter_schema().to_json(at_rank(global.lora, rank));
}

}  // namespace

core::ArtefactPtr Federated::execute(const Unit& unit, WorkerContext& context) const {
  if (unit.kind == UpdateSpec::kKind) return update(unit, context);
  const at::NoGradGuard no_grad;
  if (unit.kind == StartSpec::kKind) return start(unit, context);
  if (unit.kind == AggregateSpec::kKind) return aggregate(unit, context);
  if (unit.kind == BroadcastSpec::kKind) return broadcast(unit, context);
  if (unit.kind == EvaluateSpec::kKind) return evaluate_unit(unit, context);
  throw core::InternalError(fmt::format("{} has no unit kind '{}'", method_, unit.kind));
}

void Federated::require_own_method(const std::string& method) const {
  if (method == method_) return;
  throw core::UserError(
      fmt::format("algorithms/federated: the unit is of method {}, this worker runs {}", method, method_),
      "give every process the same recipe");
}

std::shared_ptr<data::TextDataset> Federated::open(const TextSpec& text, WorkerContext& context) const {
  const auto own = std::find_if(config_.domains.begin(), config_.domains.end(),
                                [&](const auto& domain) { return domain.name == text.name; });
  if (own == config_.domains.end())
    throw core::UserError(fmt::format("algorithms/federated: this worker's recipe has no domain '{}'", text.name),
                          "give every process the same recipe");
  return cached_dataset(own->path, core::to_spec(text_schema(), text), context);
}

models::Decoder Federated::global_model(const std::vector<std::string>& states, const std::string& base_id,
                                        const std::string& dtype, WorkerContext& context) const {
  const at::NoGradGuard no_grad;
  const auto base =
      cached_model(config_.model.path, base_id, model_id_, dtype == "bfloat16" ? at::kBFloat16 : at::kFloat, context);
  std::map<std::string, at::Tensor> deltas;
  for (const auto& id : states) add_base_change(context.artefact(id), deltas);
  return deltas.empty() ? base->share() : base->plus({deltas.begin(), deltas.end()});
}

// Numbers that go bad follow from the client's data, wherever it is trained, and may count as its answer. A site's own
// trouble (a missing file, a full disk) fails the attempt: another worker, or another time, may do better.
core::ArtefactPtr Federated::update(const Unit& unit, WorkerContext& context) const {
  const UpdateSpec spec = core::from_spec(update_schema(), unit.spec);
  require_own_method(spec.method);
  try {
    return train_client(unit, spec, context);
  } catch (const core::NumericError& error) {
    if (!spec.tolerant) throw;
    core::log::warn("client left out of the round: unit={} reason={}", unit.label, error.what());
    return write("update", {{"client", spec.client}, {"round", spec.round}, {"refused", kNumbersWentBad}}, {});
  }
}

core::ArtefactPtr Federated::train_client(const Unit& unit, const UpdateSpec& spec, WorkerContext& context) const {
  const auto seed = static_cast<uint64_t>(spec.adapter.seed);
  const TrainConfig train = train_config(spec.train, config_.train);
  std::vector<ClientData::Part> parts;
  for (const ShareSpec& share : spec.shares)
    parts.push_back({open(share.data, context), core::derive_seed(seed, "partition/order/" + share.data.name),
                     share.first, share.count});
  MORAINE_CHECK(!parts.empty(), "client {} has no data", spec.client);
  const int64_t seq_len = parts.front().dataset->seq_len();
  const ClientData data(spec.client, std::move(parts), core::derive_seed(seed, "client/" + spec.client));

  models::Decoder model = global_model(unit.inputs, spec.base, train.dtype, context);
  const uint64_t own_seed = spec.own_seed();
  const auto adapter =
      federation_->starts_fresh()
          ? adapters::Adapter::create(at_rank(spec.adapter.lora, spec.rank), model, own_seed, context.device())
          : adapter_after(spec.adapter, spec.rank, start_and_state(unit, spec.adapter, 0, context), model,
                          context.device());
  const adapters::TrainedTensors trained = adapter.trained();
  Tensors tensors = trained_tensors_of(adapter), before;
  TrainJob job{train, {}, nullptr, seq_len};
  for (auto& [name, tensor] : tensors) {
    before[name] = tensor.detach().clone();
    if (federation_->trains(trained.at(name).traits)) {
      job.parameters.emplace_back(name, tensor);
    } else {
      tensor.set_requires_grad(false);
    }
  }
  job.groups = adapter.groups();
  for (auto& group : job.groups)
    std::erase_if(group.names, [&](const std::string& name) { return !tensors.at(name).requires_grad(); });
  adapter.attach(model);
  const PruningConfig pruning = spec.pruning.value_or(PruningConfig{});
  job.loss = [&, offset = spec.round * train.steps](int64_t step, int64_t first, int64_t count) {
    std::vector<int64_t> rows = data.rows((offset + step) * train.batch_size + first, count);
    const at::Tensor batch = at::from_blob(rows.data(), {count, seq_len + 1}, at::kLong)
                                 .to(context.device(), /*non_blocking=*/false, /*copy=*/true);
    const models::PassScope scope(model, {.training = true, .step = offset + step, .first = first, .seed = own_seed});
    auto loss = model.loss(batch);
    if (const at::Tensor penalty = federation_->penalty(tensors, trained, pruning); penalty.defined())
      loss.sum = loss.sum + penalty * static_cast<double>(loss.count);
    if (spec.proximal > 0)
      loss.sum = loss.sum + distance(tensors, before) * (spec.proximal / 2 * static_cast<double>(loss.count));
    return TrainJob::MicroLoss{loss.sum, loss.count};
  };
  const TrainOutcome outcome = context.train(std::move(job));
  return contribution(spec, data.sequences(), adapter, before, outcome);
}

bool Federated::sends_seed(const adapters::AdapterConfig& adapter) const {
  return federation_->starts_fresh() && adapters::parametrisation(adapter.type).traits().from_seed;
}

Tensors Federated::sent_tensors(const adapters::Adapter& adapter) const {
  const adapters::TrainedTensors trained = adapter.trained();
  Tensors sent = federation_->starts_fresh() ? tensors_of(adapter) : trained_tensors_of(adapter);
  std::erase_if(sent, [&](const auto& entry) {
    const auto found = trained.find(entry.first);
    return found != trained.end() && !federation_->trains(found->second.traits);
  });
  return sent;
}

core::ArtefactPtr Federated::contribution(const UpdateSpec& spec, int64_t sequences, const adapters::Adapter& adapter,
                                          const Tensors& before, const TrainOutcome& outcome) const {
  const at::NoGradGuard no_grad;
  const adapters::TrainedTensors trained = adapter.trained();
  const int64_t rank = federation_->rank_after(before, trained_tensors_of(adapter), trained, spec.rank,
                                               spec.pruning.value_or(PruningConfig{}));
  Tensors sent = sent_tensors(adapter);
  if (rank != spec.rank) sent = cut(sent, trained, rank);
  Json meta = {{"client", spec.client},       {"round", spec.round},
               {"samples", sequences},        {"rank", rank},
               {"base", spec.base},           {"lora", adapter_json(spec.adapter, rank)},
               {"curve", curve_json(outcome)}};
  if (sends_seed(spec.adapter.lora)) meta["seed"] = spec.own_seed();
  return write("update", std::move(meta), {sent});
}

core::ArtefactPtr Federated::start(const Unit& unit, WorkerContext& context) const {
  const StartSpec spec = core::from_spec(start_schema(), unit.spec);
  const models::Decoder model = global_model({}, spec.base, spec.dtype, context);
  const auto adapter = adapters::Adapter::create(at_rank(spec.adapter.lora, spec.adapter.rank), model,
                                                 seed_of(spec.adapter), context.device());
  const Tensors values = tensors_of(adapter);
  return write(
      "adapter",
      {{"rank", spec.adapter.rank}, {"base", spec.base}, {"lora", adapter_json(spec.adapter, spec.adapter.rank)}},
      {values});
}

std::vector<Contribution> Federated::contributions(const Unit& unit, const AggregateSpec& spec, WorkerContext& context,
                                                   Json& refused) const {
  std::vector<Contribution> out;
  double total = 0;
  for (size_t i = 0; i < spec.clients.size(); ++i) {
    const RoundClient& client = spec.clients[i];
    auto artefact = context.artefact(unit.inputs.at(unit.inputs.size() - spec.clients.size() + i));
    const Json& meta = artefact->meta();
    // Accepted ones passed check_result(); a directory may hold what an older version accepted.
    if (meta.value("client", Json()) != client.name)
      throw core::UserError(fmt::format("algorithms/federated: the contribution of {} in round {} says it is from {}",
                                        client.name, spec.round + 1, meta.value("client", Json()).dump()),
                            "a client's worker answered for another client: check that all sites run this recipe");
    if (meta.contains("refused")) {
      refused.push_back({{"client", client.name}, {"reason", meta.at("refused")}});
      continue;
    }
    if (meta.value("base", Json()) != spec.base)
      throw core::UserError(fmt::format("algorithms/federated: {} trained against another base model", client.name),
                            "every site must use a byte-identical model");
    if (meta.value("samples", Json()) != client.samples)
      throw core::UserError(fmt::format("algorithms/federated: {} says it holds {} sequences, the plan gave it {}",
                                        client.name, meta.value("samples", Json()).dump(), client.samples),
                            "its worker runs another version or another recipe");
    const double weight = spec.weighting == "uniform" ? 1.0 : static_cast<double>(client.samples);
    total += weight;
    out.push_back({client.name, weight, meta.at("rank").get<int64_t>(), std::move(artefact)});
  }
  const auto needed = spec.min_per_round ? static_cast<size_t>(spec.min_per_round) : spec.clients.size();
  if (out.size() < needed)
    throw core::NumericError(
        fmt::format("algorithms/federated: round {} has {} usable contributions of {}, needs {}; first: {}",
                    spec.round + 1, out.size(), spec.clients.size(), needed, refused.empty() ? "" : refused[0].dump()),
        "look at the refused clients' data, lower train.learning_rate or clients.min_per_round");
  for (auto& contribution : out) contribution.weight /= total;
  return out;
}

core::ArtefactPtr Federated::aggregate(const Unit& unit, WorkerContext& context) const {
  const AggregateSpec spec = core::from_spec(aggregate_schema(), unit.spec);
  require_own_method(spec.method);
  Json refused = Json::array();
  const Round round = round_of(spec, contributions(unit, spec, context, refused),
                               start_and_state(unit, spec.adapter, spec.clients.size(), context));
  const GlobalState next = federation_->aggregate(round);
  std::vector<double> weights = next.weights;
  if (weights.empty())
    for (const auto& contribution : round.contributions) weights.push_back(contribution.weight);
  return write("adapter",
               {{"round", spec.round},
                {"rank", spec.adapter.rank},
                {"base", spec.base},
                {"refused", refused},
                {"lora", adapter_json(spec.adapter, spec.adapter.rank)},
                {"weights", weights}},
               {next.adapter, next.base_change, next.server});
}

Round Federated::round_of(const AggregateSpec& spec, std::vector<Contribution> contributions,
                          std::span<const core::ArtefactPtr> known) const {
  Round round;
  round.contributions = std::move(contributions);
  round.optimizer = spec.server;
  Tensors values;
  if (!federation_->starts_fresh()) {
    const auto global = adapter_after(spec.adapter, spec.adapter.rank, known, base(), at::kCPU);
    values = tensors_of(global);
    round.trained = global.trained();
    for (const auto& [name, tensor] : trained_tensors_of(global))
      if (federation_->trains(round.trained.at(name).traits)) {
        round.global[name] = tensor.detach();
        values.erase(name);  // a contribution without it is refused, not filled up
      }
    if (spec.has_state) round.server = server_moments(known.back());
  }
  const auto with = [this, values](const GlobalAdapter& global, int64_t rank, uint64_t seed, const Tensors& own) {
    Tensors all = values;
    for (const auto& [name, tensor] : own) all[name] = tensor;
    return changes_of(at_rank(global.lora, rank), seed, all, base());
  };
  round.change_of = [with, global = spec.adapter](const Contribution& one) {
    return with(global, one.rank, one.artefact->meta().value("seed", seed_of(global)), adapter_tensors(one.artefact));
  };
  round.change_with = [with, global = spec.adapter](const Tensors& trained) {
    return with(global, global.rank, seed_of(global), trained);
  };
  return round;
}

core::ArtefactPtr Federated::broadcast(const Unit& unit, WorkerContext& context) const {
  const BroadcastSpec spec = core::from_spec(broadcast_schema(), unit.spec);
  const auto state = context.artefact(unit.inputs.at(0));
  Tensors sent = adapter_tensors(state);
  if (state->meta().at("rank") != spec.rank)
    sent = cut(sent, adapters::Adapter::blank(at_rank(spec.lora, spec.rank), base(), 0, at::kCPU).trained(), spec.rank);
  return write("adapter",
               {{"round", state->meta().at("round")},
                {"rank", spec.rank},
                {"base", state->meta().at("base")},
                {"lora", adapters::adapter_schema().to_json(at_rank(spec.lora, spec.rank))}},
               {sent});
}

core::ArtefactPtr Federated::evaluate_unit(const Unit& unit, WorkerContext& context) const {
  const EvaluateSpec spec = core::from_spec(evaluate_schema(), unit.spec);
  models::Decoder model = global_model(unit.inputs, spec.base, spec.dtype, context);
  if (!unit.inputs.empty()) {
    MORAINE_CHECK(spec.adapter.has_value(), "{} has a state and no adapter", unit.label);
    const auto known = start_and_state(unit, *spec.adapter, 0, context);
    // FLoRA's global model has no adapter of its own.
    if (!adapter_tensors(known.back()).empty())
      adapter_after(*spec.adapter, known.back()->meta().at("rank").get<int64_t>(), known, model, context.device())
          .attach(model);
  }
  const auto data = open(spec.data, context);
  const Evaluation result = evaluate(model, *data, spec.sequences, spec.batch_size, context);
  return core::Artefact::create("evaluation", {{"result", result.to_json()}}, {});
}

}  // namespace moraine::algorithms::federated
