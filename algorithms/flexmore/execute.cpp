// What a worker does for FlexMoRE: trains, extracts, evaluates. Merges run on the coordinator through the same door.
#include <algorithm>
#include <cmath>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linalg_solve.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include "algorithms/evaluate.h"
#include "algorithms/flexmore/comparisons.h"
#include "algorithms/flexmore/encoder.h"
#include "algorithms/flexmore/experts.h"
#include "algorithms/flexmore/flexmore.h"
#include "algorithms/flexmore/phlora.h"
#include "algorithms/language_model.h"
#include "core/error.h"
#include "core/hash.h"
#include "data/text_dataset.h"
#include "models/tensor_io.h"

namespace moraine::algorithms::flexmore {
namespace {

// What a domain looks like to the routers: per layer, mean [d] and (when asked for) second moment E[x x^T] [d, d] of
// the FFN inputs over the first training sequences, float32.
struct Embedding {
  std::vector<at::Tensor> mean, second_moment;
};

Embedding domain_embedding(models::Decoder& model, const data::TextDataset& dataset, int64_t sequences,
                           bool second_moment, WorkerContext& context) {
  const at::NoGradGuard no_grad;
  constexpr int64_t kBatch = 16;
  std::vector<at::Tensor> sums, squares;
  int64_t tokens = 0;
  for (int64_t first = 0; first < sequences; first += kBatch) {
    const int64_t count = std::min(kBatch, sequences - first);
    const at::Tensor batch = training_rows(dataset, /*seed=*/0, first / kBatch, kBatch, 0, count, context.device());
    const auto inputs = model.ffn_inputs(batch.narrow(1, 0, dataset.seq_len()).contiguous());
    sums.resize(inputs.size());
    squares.resize(second_moment ? inputs.size() : 0);
    for (size_t l = 0; l < inputs.size(); ++l) {
      const at::Tensor x = inputs[l].to(at::kDouble).flatten(0, 1);
      const auto add = [](at::Tensor& total, const at::Tensor& part) { total = total.defined() ? total + part : part; };
      add(sums[l], x.sum(0));
      if (second_moment) add(squares[l], at::matmul(x.t(), x));
    }
    tokens += count * dataset.seq_len();
  }
  for (auto* totals : {&sums, &squares})
    for (auto& total : *totals) total = (total / static_cast<double>(tokens)).to(at::kFloat).cpu();
  return {sums, squares};
}

// Least squares row: w minimises E_public (w x)^2 + E_domain (w x - logit)^2 + ridge |w|^2, so that the domain's tokens
// stand out against public ones in closed form and without a bias, and rows of different owners have one scale. Our
// choice (inferred): FlexOlmo's mean embeddings say nothing about the scale of a token's logit.
at::Tensor regression_row(const at::Tensor& mean, const at::Tensor& own, const at::Tensor& open, double logit) {
  const at::Tensor moments = (own + open).to(at::kDouble);
  const int64_t width = moments.size(0);
  const double ridge = 1e-3 * moments.diagonal().mean().item<double>();
  const at::Tensor row =
      at::linalg_solve(moments + ridge * at::eye(width, moments.options()), mean.to(at::kDouble) * logit);
  return row.to(at::kFloat).contiguous();
}

at::Tensor unit_norm(const at::Tensor& row, double norm) {
  const double length = row.to(at::kDouble).norm().item<double>();
  if (length == 0)
    throw core::NumericError("algorithms/flexmore: a domain embedding is zero", "use router.init: random");
  return row * (norm / length);
}

// Rows of a router without embeddings: normal(0, 0.002) clipped to [-0.006, 0], as FlexOlmo initialises them.
at::Tensor random_row(int64_t width, uint64_t seed) {
  auto generator = at::detail::createCPUGenerator(seed);
  return at::empty({width}, at::kFloat).normal_(0, 0.002, generator).clamp_(-0.006, 0);
}

at::Tensor trainable(const at::Tensor& tensor) {
  return tensor.detach().to(at::kFloat, /*non_blocking=*/false, /*copy=*/true).contiguous().set_requires_grad(true);
}

// A fresh low-rank correction for direct training: A uniform(+-1/sqrt(in)), B zero, as LoRA (inferred: the paper
// extracts only).
models::LowRank fresh_low_rank(int64_t in, int64_t out, int64_t rank, uint64_t seed, at::Device device) {
  if (rank > std::min(in, out))
    throw core::UserError(
        fmt::format("algorithms/flexmore: rank {} is above {}, the smallest side of a [{}, {}] matrix", rank,
                    std::min(in, out), out, in),
        "choose a smaller rank");
  auto generator = at::detail::createCPUGenerator(seed);
  const double bound = 1 / std::sqrt(static_cast<double>(in));
  return {trainable(at::empty({rank, in}, at::kFloat).uniform_(-bound, bound, generator).to(device)),
          trainable(at::zeros({out, rank}, at::TensorOptions().dtype(at::kFloat).device(device)))};
}

using Datasets = std::vector<std::shared_ptr<data::TextDataset>>;

// The mean of the domains' embeddings: what one expert for all of them looks like to the router.
Embedding mean_embedding(std::vector<Embedding> embeddings) {
  Embedding mean = std::move(embeddings.front());
  const auto count = static_cast<double>(embeddings.size());
  const auto average = [&](std::vector<at::Tensor> Embedding::*part) {
    for (size_t l = 0; l < (mean.*part).size(); ++l) {
      at::Tensor& sum = (mean.*part)[l];
      for (size_t i = 1; i < embeddings.size(); ++i) sum = sum + (embeddings[i].*part)[l];
      sum = sum / count;
    }
  };
  if (embeddings.size() > 1) average(&Embedding::mean), average(&Embedding::second_moment);
  return mean;
}

// Loss on batches whose rows come from the data sets in turn.
std::function<TrainJob::MicroLoss(int64_t, int64_t, int64_t)> joint_loss(models::Decoder& model, Datasets datasets,
                                                                         uint64_t seed, int64_t batch_size,
                                                                         at::Device device) {
  return
      [&model, datasets = std::move(datasets), seed, batch_size, device](int64_t step, int64_t first, int64_t count) {
        const auto sets = static_cast<int64_t>(datasets.size());
        const int64_t share = (batch_size + sets - 1) / sets;
        std::vector<at::Tensor> rows;
        for (int64_t row = first; row < first + count; ++row)
          rows.push_back(
              training_rows(*datasets[static_cast<size_t>(row % sets)], seed, step, share, row / sets, 1, device));
        const auto loss = model.loss(at::cat(rows));
        return TrainJob::MicroLoss{loss.sum, loss.count};
      };
}

models::MixtureKernels mixture_kernels(const std::string& name) {
  return name == "reference" ? models::MixtureKernels::kReference : models::MixtureKernels::kAuto;
}

models::MixtureFfn::Options mixture_options(const core::Json& spec) {
  const auto forward =
      spec.at("forward") == "per_expert" ? models::MixtureForward::kPerExpert : models::MixtureForward::kFactored;
  return {spec.at("top_k").get<int64_t>(), spec.at("norm_topk_prob").get<bool>(), forward,
          mixture_kernels(spec.at("kernels").get<std::string>())};
}

}  // namespace

at::ScalarType FlexMore::compute_dtype() const {
  return config_.train.dtype == "bfloat16" ? at::kBFloat16 : at::kFloat;
}

core::ArtefactPtr FlexMore::execute(const Unit& unit, WorkerContext& context) const {
  using Step = core::ArtefactPtr (FlexMore::*)(const Unit&, WorkerContext&) const;
  static const std::map<std::string, Step> steps = {
      {"train_base", &FlexMore::train_base},
      {"embed_public", &FlexMore::embed_public},
      {"train_expert", &FlexMore::train_expert},
      {"extract", &FlexMore::extract},
      {"evaluate", &FlexMore::evaluate_unit},
      {"merge", &FlexMore::merge_experts},
      {"soup", &FlexMore::make_soup},
  };
  const auto step = steps.find(unit.kind);
  MORAINE_CHECK(step != steps.end(), "flexmore has no unit kind '{}'", unit.kind);
  return (this->*step->second)(unit, context);
}

std::shared_ptr<models::Decoder> FlexMore::load_base(const Unit& unit, WorkerContext& context) const {
  const std::string id = unit.spec.at("base").get<std::string>();
  if (id.starts_with("dir:")) return cached_model(config_.model.path, id, model_id_, compute_dtype(), context);
  const auto make = [&]() -> std::shared_ptr<void> {
    const auto artefact = context.artefact(id);
    const auto config = models::DecoderConfig::from_json(artefact->meta().at("config"), artefact->file().origin());
    return std::make_shared<models::Decoder>(models::Decoder::from_tensors(config, artefact->file().tensors(),
                                                                           artefact->file().origin(), compute_dtype(),
                                                                           artefact)
                                                 .on(context.device()));
  };
  return std::static_pointer_cast<models::Decoder>(context.cached("base/" + id, make));
}

std::shared_ptr<data::TextDataset> FlexMore::load_data(const core::Json& spec, WorkerContext& context) const {
  return cached_dataset(data_path(spec.at("name").get<std::string>()), spec, context);
}

at::Tensor FlexMore::encoded_row(const core::Json& spec, WorkerContext& context) const {
  if (spec.at("identity") != encoder_id_)
    throw core::UserError(fmt::format("algorithms/flexmore: the text encoder in {} differs from the coordinator's",
                                      config_.router.encoder),
                          "every site must use the same encoder and tokenizer.json");
  auto encoder =
      DomainEncoder::open(config_.router.encoder, context.device());  // used once per unit, so not worth keeping
  const at::Tensor embedding = encoder.embed(*load_data(spec.at("data"), context), config_.router.embedding_sequences);
  return project(embedding, architecture_.hidden_size, spec.at("projection_seed").get<uint64_t>());
}

std::vector<at::Tensor> FlexMore::public_rows(const core::Artefact& embedding) const {
  const at::Tensor rows = models::copy_of(*embedding.file().find("embedding"));
  std::vector<at::Tensor> out;
  for (int64_t l = 0; l < rows.size(0); ++l) {
    if (config_.router.init == "encoder") {
      out.push_back(models::copy_of(*embedding.file().find("encoded")));  // one vector for all layers, as FlexOlmo
    } else if (config_.router.init == "embedding") {
      out.push_back(unit_norm(rows[l], config_.router.init_norm).contiguous());
    } else if (config_.router.init == "centered" || config_.router.init == "regression") {
      out.push_back(at::zeros({rows.size(1)}, at::kFloat));
    } else {
      out.push_back(random_row(
          rows.size(1), core::derive_seed(static_cast<uint64_t>(config_.seed), fmt::format("router/public/{}", l))));
    }
  }
  return out;
}

core::ArtefactPtr FlexMore::train_base(const Unit& unit, WorkerContext& context) const {
  const auto dataset = load_data(unit.spec.at("data"), context);
  const auto seed = unit.spec.at("seed").get<uint64_t>();
  const TrainConfig& train = *config_.model.train;
  auto model = models::Decoder::from_config(architecture_, seed, at::kFloat).on(context.device());
  TrainJob job{train, model.make_trainable(),
               language_model_loss(model, dataset, seed, train.batch_size, context.device()), config_.seq_len};
  const TrainOutcome outcome = context.train(std::move(job));
  const auto dtype = config_.model.save_dtype == "bfloat16" ? at::kBFloat16 : at::kFloat;
  models::NamedTensors tensors;
  for (const auto& [name, weight] : model.weights()) tensors.emplace_back(name, weight.detach().cpu().to(dtype));
  std::vector<at::Tensor> keep;
  return core::Artefact::create("base", {{"config", architecture_.to_json()}, {"curve", curve_json(outcome)}},
                                models::views_of(tensors, keep));
}

core::ArtefactPtr FlexMore::embed_public(const Unit& unit, WorkerContext& context) const {
  auto model = load_base(unit, context)->share();
  const auto dataset = load_data(unit.spec.at("data"), context);
  const bool second_moment = unit.spec.at("second_moment").get<bool>();
  const Embedding embedding =
      domain_embedding(model, *dataset, unit.spec.at("sequences").get<int64_t>(), second_moment, context);
  models::NamedTensors tensors = {{"embedding", at::stack(embedding.mean)}};
  if (unit.spec.contains("encoder")) tensors.emplace_back("encoded", encoded_row(unit.spec.at("encoder"), context));
  if (second_moment) tensors.emplace_back("second_moment", at::stack(embedding.second_moment));
  std::vector<at::Tensor> keep;
  return core::Artefact::create("embedding", core::Json::object(), models::views_of(tensors, keep));
}

core::ArtefactPtr FlexMore::train_expert(const Unit& unit, WorkerContext& context) const {
  auto model = load_base(unit, context)->share();
  const core::Json& data = unit.spec.at("data");  // a list: one expert for several domains
  Datasets datasets;
  for (const auto& spec : data.is_array() ? data : core::Json::array({data}))
    datasets.push_back(load_data(spec, context));
  const auto seed = unit.spec.at("seed").get<uint64_t>();
  const auto rank = unit.spec.at("rank").get<int64_t>();
  const auto embedding = context.artefact(unit.inputs.at(0));
  const at::Tensor public_mean = models::copy_of(*embedding->file().find("embedding"));
  const bool regression = config_.router.init == "regression";
  const at::Tensor public_moment =
      regression ? models::copy_of(*embedding->file().find("second_moment")) : at::Tensor();
  std::vector<Embedding> embeddings;
  for (const auto& dataset : datasets)
    embeddings.push_back(domain_embedding(model, *dataset, config_.router.embedding_sequences, regression, context));
  const Embedding own_embedding = mean_embedding(std::move(embeddings));

  at::Tensor encoded;
  if (unit.spec.contains("encoder")) {
    const core::Json& specs = unit.spec.at("encoder");
    std::vector<at::Tensor> rows;
    for (const auto& spec : specs.is_array() ? specs : core::Json::array({specs}))
      rows.push_back(encoded_row(spec, context));
    encoded = rows.size() == 1 ? rows.front() : at::stack(rows).mean(0);
  }

  Mixture mixture{public_rows(*embedding), {}};
  const core::Json base_fingerprint = fingerprint_of_base(model.weights(), mixture.public_rows);
  Expert expert{unit.spec.at("name").get<std::string>(), {}, {}, {}};
  TrainJob job{config_.train, {}, nullptr, config_.seq_len};
  job.config.steps = unit.spec.at("train").at("steps").get<int64_t>();
  const auto own = [&](const std::string& name, at::Tensor tensor) {
    job.parameters.emplace_back(name, tensor);
    return tensor;
  };
  for (size_t l = 0; l < own_embedding.mean.size(); ++l) {
    const auto layer = static_cast<int64_t>(l);
    const at::Tensor& mean = own_embedding.mean[l];
    const models::SlotBase& base = model.base(ffn_slot(l));
    const std::string prefix = fmt::format("layers.{:03}.", l);
    models::FfnExpert ffn;
    if (rank == 0) {
      ffn.gate = own(prefix + "gate", trainable(base.gate));
      ffn.up = own(prefix + "up", trainable(base.up));
      ffn.down = own(prefix + "down", trainable(base.down));
    } else {
      const auto fresh = [&](const std::string& name, const at::Tensor& weight) {
        models::LowRank pair = fresh_low_rank(weight.size(1), weight.size(0), rank,
                                              core::derive_seed(seed, prefix + name), context.device());
        own(prefix + name + ".a", pair.a);
        own(prefix + name + ".b", pair.b);
        return pair;
      };
      ffn.gate_delta = fresh("gate", base.gate);
      ffn.up_delta = fresh("up", base.up);
      ffn.down_delta = fresh("down", base.down);
    }
    expert.layers.push_back(ffn);
    at::Tensor row;
    if (regression) {
      row = regression_row(mean, own_embedding.second_moment[l], public_moment[layer], config_.router.init_logit);
    } else if (encoded.defined()) {
      row = encoded;
    } else if (config_.router.init == "random") {
      row = random_row(mean.size(0), core::derive_seed(seed, fmt::format("router/{}", l)));
    } else {
      row = unit_norm(config_.router.init == "centered" ? mean - public_mean[layer] : mean, config_.router.init_norm);
    }
    row = row.to(context.device());
    expert.router_rows.push_back(config_.router.train ? own(prefix + "router", trainable(row)) : row);
    if (config_.router.bias != "none") {
      const at::Tensor bias =
          at::full({1}, config_.router.bias_value, at::TensorOptions().dtype(at::kFloat).device(context.device()));
      expert.biases.push_back(config_.router.bias == "learned" ? own(prefix + "router_bias", trainable(bias)) : bias);
    }
  }
  std::sort(job.parameters.begin(), job.parameters.end(),
            [](const auto& a, const auto& b) { return a.first < b.first; });
  mixture.experts = {expert};
  attach(model, mixture,
         {.top_k = 2, .norm_topk_prob = config_.norm_topk_prob, .kernels = mixture_kernels(config_.kernels)}, {});
  job.loss = datasets.size() == 1
                 ? language_model_loss(model, datasets.front(), seed, config_.train.batch_size, context.device())
                 : joint_loss(model, datasets, seed, config_.train.batch_size, context.device());
  const TrainOutcome outcome = context.train(std::move(job));
  return write_expert(expert, {{"base", unit.spec.at("base")},
                               {"base_tensors", base_fingerprint},
                               {"curve", curve_json(outcome)},
                               {"data", unit.spec.at("data")}});
}

core::ArtefactPtr FlexMore::extract(const Unit& unit, WorkerContext& context) const {
  const at::NoGradGuard no_grad;
  const auto model = load_base(unit, context);
  const auto artefact = context.artefact(unit.inputs.at(0));
  const auto rank = unit.spec.at("rank").get<int64_t>();
  Expert expert = read_expert(*artefact, 0);
  models::NamedTensors spectra;
  for (size_t l = 0; l < expert.layers.size(); ++l) {
    models::FfnExpert& ffn = expert.layers[l];
    const models::SlotBase& base = model->base(ffn_slot(l));
    const auto cut = [&](const char* name, const at::Tensor& tuned, const at::Tensor& frozen) {
      if (unit.spec.contains("subspace_seed"))
        return random_subspace_of(
            tuned, frozen.cpu(), rank,
            core::derive_seed(unit.spec.at("subspace_seed").get<uint64_t>(), fmt::format("{}/{}", l, name)));
      const Spectrum spectrum = spectrum_of_difference(tuned, frozen.cpu());
      spectra.emplace_back(fmt::format("spectrum.{}.{}", l, name), spectrum.s);
      return low_rank_of(spectrum, rank);
    };
    ffn.gate_delta = cut("gate_proj", ffn.gate, base.gate);
    ffn.up_delta = cut("up_proj", ffn.up, base.up);
    ffn.down_delta = cut("down_proj", ffn.down, base.down);
    ffn.gate = ffn.up = ffn.down = at::Tensor();
    context.progress(static_cast<double>(l + 1), static_cast<double>(expert.layers.size()));
  }
  return write_expert(expert,
                      {{"base", unit.spec.at("base")},
                       {"base_tensors", artefact->meta().at("base_tensors")},
                       {"extracted_from", unit.inputs.at(0)}},
                      std::move(spectra));
}

core::ArtefactPtr FlexMore::evaluate_unit(const Unit& unit, WorkerContext& context) const {
  auto model = load_base(unit, context)->share();
  const auto dataset = load_data(unit.spec.at("data"), context);
  const auto what = unit.spec.at("what").get<std::string>();
  if (what == "btm") return evaluate_branch_train_merge(unit, *dataset, context);
  std::vector<std::shared_ptr<models::MixtureFfn>> layers;
  std::vector<std::string> names = {"public"};
  if (what == "expert" || what == "mixture") {
    const core::Json& options = unit.spec.at("mixture");
    Mixture mixture;
    if (what == "expert") {
      mixture.public_rows = public_rows(*context.artefact(unit.inputs.at(0)));
      mixture.experts = {read_expert(*context.artefact(unit.inputs.at(1)), unit.spec.at("rank").get<int64_t>())};
      if (unit.spec.contains("scale"))
        mixture.experts = {with_scaled_change(mixture.experts.front(), model, unit.spec.at("scale").get<double>())};
    } else {
      mixture = read_mixture(*context.artefact(unit.inputs.at(0)));
    }
    const auto leave_out = options.at("leave_out").get<std::vector<std::string>>();
    layers = attach(model, mixture, mixture_options(options), leave_out);
    for (const auto& expert : mixture.experts)
      if (std::find(leave_out.begin(), leave_out.end(), expert.name) == leave_out.end()) names.push_back(expert.name);
  } else if (what == "soup") {
    attach_dense(model, read_expert(*context.artefact(unit.inputs.at(0)), 0).layers);
  }
  for (auto& layer : layers) layer->record_load(true);
  const Evaluation result = evaluate(model, *dataset, unit.spec.at("sequences").get<int64_t>(),
                                     unit.spec.at("batch_size").get<int64_t>(), context);
  core::Json meta = {{"result", result.to_json()}};
  if (!layers.empty()) {
    core::Json selected = core::Json::array(), probability = core::Json::array();
    for (const auto& layer : layers) {
      const auto& load = layer->load();
      core::Json share = core::Json::array(), mass = core::Json::array();
      for (size_t e = 0; e < names.size(); ++e) {
        share.push_back(static_cast<double>(load.selected[e]) / static_cast<double>(load.tokens));
        mass.push_back(load.probability[e] / static_cast<double>(load.tokens));
      }
      selected.push_back(share);
      probability.push_back(mass);
    }
    meta["load"] = {{"experts", names}, {"selected", selected}, {"probability", probability}};
  }
  return core::Artefact::create("evaluation", std::move(meta), {});
}

core::ArtefactPtr FlexMore::evaluate_branch_train_merge(const Unit& unit, const data::TextDataset& dataset,
                                                        WorkerContext& context) const {
  const auto base = load_base(unit, context);
  const auto rows = public_rows(*context.artefact(unit.inputs.front()));
  std::vector<Expert> experts;
  for (size_t i = 1; i < unit.inputs.size(); ++i)
    if (unit.inputs[i] != unit.spec.at("base")) experts.push_back(read_expert(*context.artefact(unit.inputs[i]), 0));
  std::sort(experts.begin(), experts.end(), [](const Expert& a, const Expert& b) { return a.name < b.name; });
  std::vector<models::Decoder> members;  // the public model, then every owner's own model as trained
  members.push_back(base->share());
  for (const Expert& expert : experts) {
    members.push_back(base->share());
    attach(members.back(), {rows, {expert}}, mixture_options(unit.spec.at("mixture")), {});
  }
  const auto loss = [&](const at::Tensor& sequences) {
    return branch_train_merge_loss(members, sequences, unit.spec.at("mixture").at("top_k").get<int64_t>());
  };
  const Evaluation result = evaluate(loss, dataset, unit.spec.at("sequences").get<int64_t>(),
                                     unit.spec.at("batch_size").get<int64_t>(), context);
  return core::Artefact::create("evaluation", {{"result", result.to_json()}}, {});
}

core::ArtefactPtr FlexMore::merge_experts(const Unit& unit, WorkerContext& context) const {
  const at::NoGradGuard no_grad;
  const auto model = load_base(unit, context);
  const auto rows = public_rows(*context.artefact(unit.inputs.at(0)));
  const auto ranks = unit.spec.at("ranks").get<std::vector<int64_t>>();
  std::vector<core::ArtefactPtr> experts;
  for (size_t i = 0; i < ranks.size(); ++i) experts.push_back(context.artefact(unit.inputs.at(i + 1)));
  const core::Json base_fingerprint = fingerprint_of_base(model->weights(), rows);
  return write_mixture(merge(experts, ranks, rows, base_fingerprint), {{"base", unit.spec.at("base")}});
}

core::ArtefactPtr FlexMore::make_soup(const Unit& unit, WorkerContext& context) const {
  const at::NoGradGuard no_grad;
  std::vector<Expert> experts;
  for (const auto& id : unit.inputs)
    if (id != unit.spec.at("base")) experts.push_back(read_expert(*context.artefact(id), 0));
  std::sort(experts.begin(), experts.end(), [](const Expert& a, const Expert& b) { return a.name < b.name; });
  Expert mean = experts.front();
  mean.name = "soup";
  mean.layers = soup(experts);
  return write_expert(mean, {{"base", unit.spec.at("base")}, {"of", experts.size()}});
}

}  // namespace moraine::algorithms::flexmore
