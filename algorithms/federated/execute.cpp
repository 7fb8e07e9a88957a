// What workers and the coordinator do in a federation: train a client, aggregate, cut what is sent, evaluate. A unit's
// specification says what; of the worker's own recipe only paths count, and how often to save and to log.
#include <algorithm>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/matmul.h>

#include "algorithms/adapters/adapter.h"
#include "algorithms/evaluate.h"
#include "algorithms/federated/client_data.h"
#include "algorithms/federated/factors.h"
#include "algorithms/federated/federated.h"
#include "algorithms/language_model.h"
#include "core/error.h"
#include "core/hash.h"
#include "core/log.h"
#include "models/tensor_io.h"

namespace moraine::algorithms::federated {
namespace {

using core::Json;

core::ArtefactPtr write(const std::string& kind, Json meta,
                        std::initializer_list<std::reference_wrapper<const Factors>> groups) {
  models::NamedTensors tensors;
  for (const Factors& group : groups)
    for (const auto& [name, tensor] : group) tensors.emplace_back(name, tensor.detach().cpu());
  std::vector<at::Tensor> keep;
  return core::Artefact::create(kind, std::move(meta), models::views_of(tensors, keep));
}

}  // namespace

core::ArtefactPtr Federated::execute(const Unit& unit, WorkerContext& context) const {
  if (unit.kind == UpdateSpec::kKind) return update(unit, context);
  const at::NoGradGuard no_grad;
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
  for (const auto& id : states) {
    const auto state = context.artefact(id);
    for (const auto& [name, a] : read_factors(state, ".base_A")) {
      const std::string slot = name.substr(0, name.rfind(".base_A"));
      const at::Tensor product = at::matmul(models::borrow(*state->file().find(slot + ".base_B"), state), a);
      at::Tensor& delta = deltas[slot + ".weight"];
      delta = delta.defined() ? delta + product : product;
    }
  }
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
  const uint64_t adapter_seed = core::derive_seed(seed, fmt::format("adapter/{}/{}", spec.client, spec.round));
  const auto adapter =
      adapters::Adapter::create(at_rank(spec.adapter.lora, spec.rank), model.slots(), adapter_seed, context.device());
  if (!federation_->starts_fresh()) {
    const Factors start = unit.inputs.empty()
                              ? first_factors(spec.adapter, model.slots())
                              : factors_after(context.artefact(unit.inputs.back()), spec.adapter, model.slots());
    set_factors(adapter, cut(start, spec.rank));
  }
  Factors factors = live(adapter), before;
  TrainJob job{train, {}, nullptr, seq_len};
  for (auto& [name, tensor] : factors) {
    before[name] = tensor.detach().clone();
    if (federation_->trains(factor_of(name))) {
      job.parameters.emplace_back(name, tensor);
    } else {
      tensor.set_requires_grad(false);
    }
  }
  adapter.attach(model);
  const PruningConfig pruning = spec.pruning.value_or(PruningConfig{});
  job.loss = [&, offset = spec.round * train.steps](int64_t step, int64_t first, int64_t count) {
    std::vector<int64_t> rows = data.rows((offset + step) * train.batch_size + first, count);
    const at::Tensor batch = at::from_blob(rows.data(), {count, seq_len + 1}, at::kLong)
                                 .to(context.device(), /*non_blocking=*/false, /*copy=*/true);
    const models::PassScope scope(model,
                                  {.training = true, .step = offset + step, .first = first, .seed = adapter_seed});
    auto loss = model.loss(batch);
    if (const at::Tensor penalty = federation_->penalty(factors, pruning); penalty.defined())
      loss.sum = loss.sum + penalty * static_cast<double>(loss.count);
    return TrainJob::MicroLoss{loss.sum, loss.count};
  };
  const TrainOutcome outcome = context.train(std::move(job));
  return contribution(spec, data.sequences(), before, factors, outcome);
}

core::ArtefactPtr Federated::contribution(const UpdateSpec& spec, int64_t sequences, const Factors& before,
                                          const Factors& after, const TrainOutcome& outcome) const {
  const at::NoGradGuard no_grad;
  Factors sent;
  for (const auto& [name, tensor] : after)
    if (federation_->trains(factor_of(name))) sent[name] = tensor.detach();
  const int64_t rank = federation_->rank_after(before, after, spec.rank, spec.pruning.value_or(PruningConfig{}));
  sent = cut(sent, rank);
  return write("update",
               {{"client", spec.client},
                {"round", spec.round},
                {"samples", sequences},
                {"rank", rank},
                {"base", spec.base},
                {"lora", adapters::adapter_schema().to_json(at_rank(spec.adapter.lora, rank))},
                {"curve", curve_json(outcome)}},
               {sent});
}

std::vector<Contribution> Federated::contributions(const Unit& unit, const AggregateSpec& spec, WorkerContext& context,
                                                   Json& refused) const {
  std::vector<Contribution> out;
  double total = 0;
  for (size_t i = 0; i < spec.clients.size(); ++i) {
    const RoundClient& client = spec.clients[i];
    auto artefact = context.artefact(unit.inputs.at(i + (spec.has_state ? 1 : 0)));
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
  Round round;
  round.contributions = contributions(unit, spec, context, refused);
  round.optimizer = spec.server;
  round.scale = scale_of(spec.adapter.lora);
  round.global = first_factors(spec.adapter, slots());
  if (spec.has_state) {
    const auto state = context.artefact(unit.inputs.front());
    for (auto& [name, tensor] : read_adapter(state)) round.global[name] = tensor;
    for (const char* prefix : {"m.", "v."})
      for (auto& [name, tensor] : read_factors(state, ".lora_"))
        if (name.starts_with(prefix)) round.server[name] = tensor;
  }
  const GlobalState next = federation_->aggregate(round);
  std::vector<double> weights = next.weights;
  if (weights.empty())
    for (const auto& contribution : round.contributions) weights.push_back(contribution.weight);
  return write("adapter",
               {{"round", spec.round},
                {"rank", spec.adapter.rank},
                {"base", spec.base},
                {"refused", refused},
                {"lora", adapters::adapter_schema().to_json(at_rank(spec.adapter.lora, spec.adapter.rank))},
                {"weights", weights}},
               {next.factors, next.base_change, next.server});
}

core::ArtefactPtr Federated::broadcast(const Unit& unit, WorkerContext& context) const {
  const BroadcastSpec spec = core::from_spec(broadcast_schema(), unit.spec);
  const auto state = context.artefact(unit.inputs.at(0));
  const Factors factors = cut(read_adapter(state), spec.rank);
  return write("adapter",
               {{"round", state->meta().at("round")},
                {"rank", spec.rank},
                {"base", state->meta().at("base")},
                {"lora", adapters::adapter_schema().to_json(at_rank(spec.lora, spec.rank))}},
               {factors});
}

core::ArtefactPtr Federated::evaluate_unit(const Unit& unit, WorkerContext& context) const {
  const EvaluateSpec spec = core::from_spec(evaluate_schema(), unit.spec);
  models::Decoder model = global_model(unit.inputs, spec.base, spec.dtype, context);
  if (!unit.inputs.empty()) {
    MORAINE_CHECK(spec.adapter.has_value(), "{} has a state and no adapter", unit.label);
    const auto state = context.artefact(unit.inputs.back());
    // FLoRA's global model has no adapter of its own.
    if (!read_factors(state, ".lora_").empty()) {
      const auto rank = state->meta().at("rank").get<int64_t>();
      const auto adapter =
          adapters::Adapter::create(at_rank(spec.adapter->lora, rank), model.slots(), 0, context.device());
      set_factors(adapter, factors_after(state, *spec.adapter, model.slots()));
      adapter.attach(model);
    }
  }
  const auto data = open(spec.data, context);
  const Evaluation result = evaluate(model, *data, spec.sequences, spec.batch_size, context);
  return core::Artefact::create("evaluation", {{"result", result.to_json()}}, {});
}

}  // namespace moraine::algorithms::federated
