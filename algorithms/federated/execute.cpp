// What workers and the coordinator do in a federation: train a client, aggregate, cut what is sent, evaluate.
#include <algorithm>
#include <set>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/matmul.h>

#include "algorithms/adapters/lora.h"
#include "algorithms/evaluate.h"
#include "algorithms/federated/client_data.h"
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

// The tensors whose names contain `part`.
Factors read(const core::ArtefactPtr& artefact, std::string_view part) {
  Factors out;
  for (const auto& view : artefact->file().tensors())
    if (view.name.find(part) != std::string::npos) out[view.name] = models::borrow(view, artefact);
  return out;
}

Factors live(const adapters::LoraAdapter& adapter) {
  const models::NamedTensors parameters = adapter.parameters();
  return {parameters.begin(), parameters.end()};
}

std::string factor_of(const std::string& name) { return name.substr(name.rfind("lora_")); }

}  // namespace

core::ArtefactPtr Federated::execute(const Unit& unit, WorkerContext& context) const {
  if (unit.kind == "client_update") return update(unit, context);
  const at::NoGradGuard no_grad;
  if (unit.kind == "aggregate") return aggregate(unit, context);
  if (unit.kind == "broadcast") return broadcast(unit, context);
  if (unit.kind == "evaluate") return evaluate_unit(unit, context);
  throw core::InternalError(fmt::format("{} has no unit kind '{}'", method_, unit.kind));
}

std::shared_ptr<models::Decoder> Federated::load_base(WorkerContext& context, const std::string& id) const {
  const auto dtype = config_.train.dtype == "bfloat16" ? at::kBFloat16 : at::kFloat;
  return cached_model(config_.model.path, id, model_id_, dtype, context);
}

models::Decoder Federated::global_model(const Unit& unit, WorkerContext& context) const {
  const at::NoGradGuard no_grad;
  const auto base = load_base(context, unit.spec.at("base"));
  std::map<std::string, at::Tensor> deltas;
  for (const auto& id : unit.inputs) {
    const auto state = context.artefact(id);
    for (const auto& [name, a] : read(state, ".base_A")) {
      const std::string slot = name.substr(0, name.rfind(".base_A"));
      const at::Tensor product = at::matmul(models::borrow(*state->file().find(slot + ".base_B"), state), a);
      at::Tensor& delta = deltas[slot + ".weight"];
      delta = delta.defined() ? delta + product : product;
    }
  }
  return deltas.empty() ? base->share() : base->plus({deltas.begin(), deltas.end()});
}

Factors Federated::first_factors(const models::Backbone& model) const {
  return live(adapters::LoraAdapter::create(
      lora(server_rank()), model.slots(), core::derive_seed(static_cast<uint64_t>(config_.seed), "adapter"), at::kCPU));
}

Factors Federated::global_factors(const Unit& unit, WorkerContext& context, const models::Backbone& model) const {
  const at::NoGradGuard no_grad;
  Factors factors = first_factors(model);
  if (unit.inputs.empty()) return factors;
  const auto state = context.artefact(unit.inputs.back());
  factors =
      cut(factors, state->meta().at("rank").get<int64_t>());  // what was not sent has the seed's values at that rank
  for (auto& [name, tensor] : read(state, ".lora_")) factors[name] = tensor;
  return factors;
}

void Federated::set_factors(const adapters::LoraAdapter& adapter, const Factors& factors) const {
  const at::NoGradGuard no_grad;
  for (const auto& [name, parameter] : adapter.parameters()) {
    const auto found = factors.find(name);
    MORAINE_CHECK(found != factors.end() && found->second.sizes() == parameter.sizes(), "factor '{}' does not fit",
                  name);
    parameter.copy_(found->second);
  }
}

core::ArtefactPtr Federated::update(const Unit& unit, WorkerContext& context) const {
  const auto refuse = [&](const core::Error& error) {
    if (!unit.spec.at("tolerant").get<bool>()) throw;
    core::log::warn("client left out of the round: unit={} reason={}", unit.label, error.what());
    return write("update",
                 {{"client", unit.spec.at("client")}, {"round", unit.spec.at("round")}, {"refused", error.what()}}, {});
  };
  try {
    return train_client(unit, context);
  } catch (const core::NumericError& error) {
    return refuse(error);
  } catch (const core::UserError& error) {
    return refuse(error);
  }
}

core::ArtefactPtr Federated::train_client(const Unit& unit, WorkerContext& context) const {
  const Json& spec = unit.spec;
  const auto client = spec.at("client").get<std::string>();
  const auto round = spec.at("round").get<int64_t>(), rank = spec.at("rank").get<int64_t>();
  const auto seed = static_cast<uint64_t>(config_.seed);
  TrainConfig train = config_.train;
  train.steps = spec.at("train").at("steps");
  train.warmup_steps = spec.at("train").at("warmup_steps");

  std::vector<ClientData::Part> parts;
  for (const auto& [name, share] : spec.at("shares").items())
    parts.push_back({cached_dataset(domain(name).path, spec.at("data").at(name), context),
                     core::derive_seed(seed, "partition/order/" + name), share.at("first"), share.at("count")});
  const ClientData data(client, std::move(parts), core::derive_seed(seed, "client/" + client));

  models::Decoder model = global_model(unit, context);
  const uint64_t adapter_seed = core::derive_seed(seed, fmt::format("adapter/{}/{}", client, round));
  const auto adapter = adapters::LoraAdapter::create(lora(rank), model.slots(), adapter_seed, context.device());
  if (!federation_->starts_fresh()) set_factors(adapter, cut(global_factors(unit, context, model), rank));
  Factors factors = live(adapter), before;
  TrainJob job{train, {}, nullptr, config_.seq_len};
  for (auto& [name, tensor] : factors) {
    before[name] = tensor.detach().clone();
    if (federation_->trains(factor_of(name))) {
      job.parameters.emplace_back(name, tensor);
    } else {
      tensor.set_requires_grad(false);
    }
  }
  adapter.attach(model);
  const int64_t offset = round * train.steps;
  const PruningConfig pruning = config_.pruning;
  job.loss = [&](int64_t step, int64_t first, int64_t count) {
    std::vector<int64_t> rows = data.rows((offset + step) * train.batch_size + first, count);
    const at::Tensor batch = at::from_blob(rows.data(), {count, config_.seq_len + 1}, at::kLong)
                                 .to(context.device(), /*non_blocking=*/false, /*copy=*/true);
    auto loss = model.loss(batch);
    if (const at::Tensor penalty = federation_->penalty(factors, pruning); penalty.defined())
      loss.sum = loss.sum + penalty * static_cast<double>(loss.count);
    return TrainJob::MicroLoss{loss.sum, loss.count};
  };
  const TrainOutcome outcome = context.train(std::move(job));

  const at::NoGradGuard no_grad;
  Factors sent;
  for (const auto& [name, tensor] : factors)
    if (federation_->trains(factor_of(name))) sent[name] = tensor.detach();
  const int64_t next_rank = federation_->rank_after(before, factors, rank, pruning);
  sent = cut(sent, next_rank);
  return write("update",
               {{"client", client},
                {"round", round},
                {"samples", data.sequences()},
                {"rank", next_rank},
                {"base", spec.at("base")},
                {"lora", adapters::lora_schema().to_json(lora(next_rank))},
                {"curve", curve_json(outcome)}},
               {sent});
}

core::ArtefactPtr Federated::aggregate(const Unit& unit, WorkerContext& context) const {
  const Json& spec = unit.spec;
  const bool has_state = spec.at("has_state").get<bool>();
  const auto expected = spec.at("clients").get<std::vector<std::string>>();
  Round round;
  round.optimizer = config_.server;
  round.scale = scale();
  Json refused = Json::array();
  double total = 0;
  std::set<std::string> seen;
  for (size_t i = 0; i < expected.size(); ++i) {
    auto artefact = context.artefact(unit.inputs.at(i + (has_state ? 1 : 0)));
    const Json& meta = artefact->meta();
    const auto client = meta.value("client", std::string());
    if (client != expected[i] || !seen.insert(client).second)
      throw core::UserError(fmt::format("algorithms/federated: the contribution of {} in round {} says it is from '{}'",
                                        expected[i], spec.at("round").get<int64_t>() + 1, client),
                            "a client's worker answered for another client: check that all sites run this recipe");
    if (meta.contains("refused")) {
      refused.push_back({{"client", client}, {"reason", meta.at("refused")}});
      continue;
    }
    if (meta.value("base", Json()) != spec.at("base"))
      throw core::UserError(fmt::format("algorithms/federated: {} trained against another base model", client),
                            "every site must use a byte-identical model");
    const double weight = config_.clients.weighting == "uniform" ? 1.0 : meta.at("samples").get<double>();
    total += weight;
    round.contributions.push_back({client, weight, meta.at("rank").get<int64_t>(), std::move(artefact)});
  }
  const auto needed =
      config_.clients.min_per_round ? static_cast<size_t>(config_.clients.min_per_round) : expected.size();
  if (round.contributions.size() < needed)
    throw core::NumericError(
        fmt::format("algorithms/federated: round {} has {} usable contributions of {}, needs {}; first: {}",
                    spec.at("round").get<int64_t>() + 1, round.contributions.size(), expected.size(), needed,
                    refused.empty() ? "" : refused[0].dump()),
        "look at the refused clients' data, lower train.learning_rate or clients.min_per_round");
  for (auto& contribution : round.contributions) contribution.weight /= total;

  const auto base = load_base(context, spec.at("base"));
  round.global = first_factors(*base);
  if (has_state) {
    const auto state = context.artefact(unit.inputs.front());
    for (auto& [name, tensor] : read(state, ".lora_"))
      if (!name.starts_with("m.") && !name.starts_with("v.")) round.global[name] = tensor;
    for (const char* prefix : {"m.", "v."})
      for (auto& [name, tensor] : read(state, ".lora_"))
        if (name.starts_with(prefix)) round.server[name] = tensor;
  }
  const GlobalState next = federation_->aggregate(round);
  std::vector<double> weights;
  for (const auto& contribution : round.contributions) weights.push_back(contribution.weight);
  return write("adapter",
               {{"round", spec.at("round")},
                {"rank", server_rank()},
                {"base", spec.at("base")},
                {"refused", refused},
                {"lora", adapters::lora_schema().to_json(lora(server_rank()))},
                {"weights", weights}},
               {next.factors, next.base_change, next.server});
}

core::ArtefactPtr Federated::broadcast(const Unit& unit, WorkerContext& context) const {
  const auto state = context.artefact(unit.inputs.at(0));
  const auto rank = unit.spec.at("rank").get<int64_t>();
  Factors factors;
  for (auto& [name, tensor] : read(state, ".lora_"))
    if (!name.starts_with("m.") && !name.starts_with("v.")) factors[name] = tensor;
  factors = cut(factors, rank);
  return write("adapter",
               {{"round", state->meta().at("round")},
                {"rank", rank},
                {"base", state->meta().at("base")},
                {"lora", adapters::lora_schema().to_json(lora(rank))}},
               {factors});
}

core::ArtefactPtr Federated::evaluate_unit(const Unit& unit, WorkerContext& context) const {
  const Json& spec = unit.spec;
  models::Decoder model = global_model(unit, context);
  if (!unit.inputs.empty()) {
    const auto state = context.artefact(unit.inputs.back());
    const bool adapted = !read(state, ".lora_").empty();  // FLoRA's global model has no adapter of its own
    if (adapted) {
      const auto adapter = adapters::LoraAdapter::create(lora(state->meta().at("rank").get<int64_t>()), model.slots(),
                                                         0, context.device());
      set_factors(adapter, global_factors(unit, context, model));
      adapter.attach(model);
    }
  }
  const auto data = cached_dataset(domain(spec.at("data").at("name")).path, spec.at("data"), context);
  const Evaluation result =
      evaluate(model, *data, spec.at("sequences").get<int64_t>(), spec.at("batch_size").get<int64_t>(), context);
  return core::Artefact::create("evaluation", {{"result", result.to_json()}}, {});
}

}  // namespace moraine::algorithms::federated
