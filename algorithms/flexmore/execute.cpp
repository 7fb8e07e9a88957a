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
    const at::Tensor batch = training_rows(dataset, /*seed=*/0, first, count, context.device());
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
              training_rows(*datasets[static_cast<size_t>(row % sets)], seed, step * share + row / sets, 1, device));
        const auto loss = model.loss(at::cat(rows));
        return TrainJob::MicroLoss{loss.sum, loss.count};
      };
}

models::MixtureKernels mixture_kernels(const std::string& name) {
  return name == "reference" ? models::MixtureKernels::kReference : models::MixtureKernels::kAuto;
}

models::MixtureFfn::Options mixture_options(const MixtureSpec& spec) {
  const auto forward =
      spec.forward == "per_expert" ? models::MixtureForward::kPerExpert : models::MixtureForward::kFactored;
  return {spec.top_k, spec.norm_topk_prob, forward, mixture_kernels(spec.kernels)};
}

at::ScalarType type_of(const std::string& dtype) { return dtype == "bfloat16" ? at::kBFloat16 : at::kFloat; }

std::vector<at::Tensor> public_rows(const core::Artefact& embedding, const PublicRowsSpec& spec) {
  const at::Tensor rows = models::copy_of(*embedding.file().find("embedding"));
  std::vector<at::Tensor> out;
  for (int64_t l = 0; l < rows.size(0); ++l) {
    if (spec.init == "encoder") {
      out.push_back(models::copy_of(*embedding.file().find("encoded")));  // one vector for all layers, as FlexOlmo
    } else if (spec.init == "embedding") {
      out.push_back(unit_norm(rows[l], spec.norm).contiguous());
    } else if (spec.init == "centered" || spec.init == "regression") {
      out.push_back(at::zeros({rows.size(1)}, at::kFloat));
    } else {
      out.push_back(random_row(rows.size(1), core::derive_seed(spec.seed, fmt::format("router/public/{}", l))));
    }
  }
  return out;
}

// What an expert's own text and the public one look like to its router rows.
struct RowSources {
  Embedding own;
  at::Tensor public_mean, public_moment;  // [L, d]; [L, d, d] for regression
  at::Tensor encoded;                     // [d] for encoder
};

// The row of layer `l` before training, [d] float32 on the CPU.
at::Tensor first_row(const TrainExpertSpec& spec, const RowSources& sources, size_t l) {
  const auto layer = static_cast<int64_t>(l);
  const at::Tensor& mean = sources.own.mean[l];
  const std::string& init = spec.public_rows.init;
  if (init == "regression")
    return regression_row(mean, sources.own.second_moment[l], sources.public_moment[layer], spec.rows.logit);
  if (init == "encoder") return sources.encoded;
  if (init == "random") return random_row(mean.size(0), core::derive_seed(spec.seed, fmt::format("router/{}", l)));
  return unit_norm(init == "centered" ? mean - sources.public_mean[layer] : mean, spec.rows.norm);
}

// An expert before training; everything of it that is trained goes into `parameters`.
Expert fresh_expert(const TrainExpertSpec& spec, const models::Decoder& model, const RowSources& sources,
                    models::NamedTensors& parameters, at::Device device) {
  Expert expert{spec.name, {}, {}, {}};
  const auto own = [&](const std::string& name, at::Tensor tensor) {
    parameters.emplace_back(name, tensor);
    return tensor;
  };
  for (size_t l = 0; l < sources.own.mean.size(); ++l) {
    const models::SlotBase& base = model.base(ffn_slot(l));
    const std::string prefix = fmt::format("layers.{:03}.", l);
    const auto fresh = [&](const std::string& name, const at::Tensor& weight) {
      models::LowRank pair = fresh_low_rank(weight.size(1), weight.size(0), spec.rank,
                                            core::derive_seed(spec.seed, prefix + name), device);
      own(prefix + name + ".a", pair.a);
      own(prefix + name + ".b", pair.b);
      return pair;
    };
    models::FfnExpert ffn;
    if (spec.rank == 0) {
      ffn.gate = own(prefix + "gate", trainable(base.gate));
      ffn.up = own(prefix + "up", trainable(base.up));
      ffn.down = own(prefix + "down", trainable(base.down));
    } else {
      ffn.gate_delta = fresh("gate", base.gate);
      ffn.up_delta = fresh("up", base.up);
      ffn.down_delta = fresh("down", base.down);
    }
    expert.layers.push_back(ffn);
    const at::Tensor row = first_row(spec, sources, l).to(device);
    expert.router_rows.push_back(spec.rows.train ? own(prefix + "router", trainable(row)) : row);
    if (spec.rows.bias == "none") continue;
    const at::Tensor bias = at::full({1}, spec.rows.bias_value, at::TensorOptions().dtype(at::kFloat).device(device));
    expert.biases.push_back(spec.rows.bias == "learned" ? own(prefix + "router_bias", trainable(bias)) : bias);
  }
  std::sort(parameters.begin(), parameters.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  return expert;
}

// Which experts the tokens of a text chose, per layer.
core::Json load_json(const std::vector<std::shared_ptr<models::MixtureFfn>>& layers, const Mixture& mixture) {
  core::Json names = {"public"}, selected = core::Json::array(), probability = core::Json::array();
  for (const auto& expert : mixture.experts) names.push_back(expert.name);
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
  return {{"experts", names}, {"selected", selected}, {"probability", probability}};
}

// Experts among a unit's inputs; the public model may be one too.
std::vector<Expert> read_experts(const Unit& unit, size_t first, const std::string& base, WorkerContext& context) {
  std::vector<Expert> experts;
  for (size_t i = first; i < unit.inputs.size(); ++i)
    if (unit.inputs[i] != base) experts.push_back(read_expert(*context.artefact(unit.inputs[i]), 0));
  std::sort(experts.begin(), experts.end(), [](const Expert& a, const Expert& b) { return a.name < b.name; });
  return experts;
}

Evaluation evaluate_branch_train_merge(const Unit& unit, const EvaluateSpec& spec, const models::Decoder& base,
                                       const data::TextDataset& text, WorkerContext& context) {
  const auto rows = public_rows(*context.artefact(unit.inputs.front()), spec.public_rows.value());
  std::vector<models::Decoder> members;  // the public model, then every owner's own model as trained
  members.push_back(base.share());
  for (const Expert& expert : read_experts(unit, 1, spec.base, context)) {
    members.push_back(base.share());
    attach(members.back(), {rows, {expert}}, mixture_options(spec.mixture.value()));
  }
  const auto loss = [&](const at::Tensor& sequences) {
    return branch_train_merge_loss(members, sequences, spec.mixture->top_k);
  };
  return evaluate(loss, text, spec.sequences, spec.batch_size, context);
}

}  // namespace

core::ArtefactPtr FlexMore::execute(const Unit& unit, WorkerContext& context) const {
  using Step = core::ArtefactPtr (FlexMore::*)(const Unit&, WorkerContext&) const;
  static const std::map<std::string, Step> steps = {
      {TrainBaseSpec::kKind, &FlexMore::train_base},     {EmbedPublicSpec::kKind, &FlexMore::embed_public},
      {TrainExpertSpec::kKind, &FlexMore::train_expert}, {ExtractSpec::kKind, &FlexMore::extract},
      {EvaluateSpec::kKind, &FlexMore::evaluate_unit},   {MergeSpec::kKind, &FlexMore::merge_experts},
      {SoupSpec::kKind, &FlexMore::make_soup},
  };
  const auto step = steps.find(unit.kind);
  MORAINE_CHECK(step != steps.end(), "flexmore has no unit kind '{}'", unit.kind);
  return (this->*step->second)(unit, context);
}

std::shared_ptr<models::Decoder> FlexMore::load_base(const OnPublicModel& spec, WorkerContext& context) const {
  const at::ScalarType dtype = type_of(spec.dtype);
  if (spec.base.starts_with("dir:")) return cached_model(config_.model.path, spec.base, model_id_, dtype, context);
  const auto make = [&]() -> std::shared_ptr<void> {
    const auto artefact = context.artefact(spec.base);
    const auto config = models::DecoderConfig::from_json(artefact->meta().at("config"), artefact->file().origin());
    return std::make_shared<models::Decoder>(
        models::Decoder::from_tensors(config, artefact->file().tensors(), artefact->file().origin(), dtype, artefact)
            .on(context.device()));
  };
  const std::string key = fmt::format("base/{}/{}", spec.dtype, spec.base);
  return std::static_pointer_cast<models::Decoder>(context.cached(key, make));
}

std::shared_ptr<data::TextDataset> FlexMore::load_text(const TextSpec& spec, WorkerContext& context) const {
  return cached_dataset(data_path(spec.name), core::to_spec(text_schema(), spec), context);
}

at::Tensor FlexMore::encoded_row(const EncoderSpec& spec, int64_t sequences, int64_t width,
                                 WorkerContext& context) const {
  if (spec.identity != encoder_id_)
    throw core::UserError(fmt::format("algorithms/flexmore: the text encoder in '{}' differs from the coordinator's",
                                      config_.router.encoder),
                          "every site must use the same encoder and tokenizer.json");
  auto encoder =
      DomainEncoder::open(config_.router.encoder, context.device());  // used once per unit, so not worth keeping
  return project(encoder.embed(*load_text(spec.data, context), sequences), width, spec.projection_seed);
}

core::ArtefactPtr FlexMore::train_base(const Unit& unit, WorkerContext& context) const {
  const auto spec = core::from_spec(TrainBaseSpec::schema(), unit.spec);
  const auto text = load_text(spec.data, context);
  const TrainConfig train = train_config(spec.train, config_.model.train.value_or(TrainConfig()));
  const auto config = models::DecoderConfig::from_json(spec.architecture, "unit specification");
  auto model = models::Decoder::from_config(config, spec.seed, at::kFloat).on(context.device());
  TrainJob job{train, model.make_trainable(),
               language_model_loss(model, text, spec.seed, train.batch_size, context.device()), spec.data.seq_len};
  const TrainOutcome outcome = context.train(std::move(job));
  models::NamedTensors tensors;
  for (const auto& [name, weight] : model.weights())
    tensors.emplace_back(name, weight.detach().cpu().to(type_of(spec.save_dtype)));
  std::vector<at::Tensor> keep;
  return core::Artefact::create("base", {{"config", config.to_json()}, {"curve", curve_json(outcome)}},
                                models::views_of(tensors, keep));
}

core::ArtefactPtr FlexMore::embed_public(const Unit& unit, WorkerContext& context) const {
  const auto spec = core::from_spec(EmbedPublicSpec::schema(), unit.spec);
  auto model = load_base(spec, context)->share();
  const Embedding embedding =
      domain_embedding(model, *load_text(spec.data, context), spec.sequences, spec.second_moment, context);
  models::NamedTensors tensors = {{"embedding", at::stack(embedding.mean)}};
  if (spec.encoder)
    tensors.emplace_back("encoded", encoded_row(*spec.encoder, spec.sequences, model.config().hidden_size, context));
  if (spec.second_moment) tensors.emplace_back("second_moment", at::stack(embedding.second_moment));
  std::vector<at::Tensor> keep;
  return core::Artefact::create("embedding", core::Json::object(), models::views_of(tensors, keep));
}

core::ArtefactPtr FlexMore::train_expert(const Unit& unit, WorkerContext& context) const {
  const auto spec = core::from_spec(TrainExpertSpec::schema(), unit.spec);
  auto model = load_base(spec, context)->share();
  const bool regression = spec.public_rows.init == "regression";
  const auto embedding = context.artefact(unit.inputs.at(0));
  RowSources sources;
  sources.public_mean = models::copy_of(*embedding->file().find("embedding"));
  if (regression) sources.public_moment = models::copy_of(*embedding->file().find("second_moment"));
  Datasets texts;
  std::vector<Embedding> embeddings;
  for (const auto& data : spec.data) {
    texts.push_back(load_text(data, context));
    embeddings.push_back(domain_embedding(model, *texts.back(), spec.rows.embedding_sequences, regression, context));
  }
  sources.own = mean_embedding(std::move(embeddings));
  std::vector<at::Tensor> encoded;
  for (const auto& encoder : spec.encoder)
    encoded.push_back(encoded_row(encoder, spec.rows.embedding_sequences, model.config().hidden_size, context));
  if (!encoded.empty()) sources.encoded = encoded.size() == 1 ? encoded.front() : at::stack(encoded).mean(0);

  Mixture mixture{public_rows(*embedding, spec.public_rows), {}};
  const core::Json base_fingerprint = fingerprint_of_base(model.weights(), mixture.public_rows);
  const TrainConfig train = train_config(spec.train, config_.train);
  TrainJob job{train, {}, nullptr, texts.front()->seq_len()};
  const Expert expert = fresh_expert(spec, model, sources, job.parameters, context.device());
  mixture.experts = {expert};
  attach(model, mixture, {.top_k = 2, .norm_topk_prob = spec.norm_topk_prob, .kernels = mixture_kernels(spec.kernels)});
  job.loss = texts.size() == 1
                 ? language_model_loss(model, texts.front(), spec.seed, train.batch_size, context.device())
                 : joint_loss(model, texts, spec.seed, train.batch_size, context.device());
  const TrainOutcome outcome = context.train(std::move(job));
  const core::Json& data = unit.spec.at("data");
  return write_expert(expert, {{"base", spec.base},
                               {"base_tensors", base_fingerprint},
                               {"curve", curve_json(outcome)},
                               {"data", data.size() == 1 ? data.front() : data}});
}

core::ArtefactPtr FlexMore::extract(const Unit& unit, WorkerContext& context) const {
  const at::NoGradGuard no_grad;
  const auto spec = core::from_spec(ExtractSpec::schema(), unit.spec);
  const auto model = load_base(spec, context);
  const auto artefact = context.artefact(unit.inputs.at(0));
  Expert expert = read_expert(*artefact, 0);
  models::NamedTensors spectra;
  for (size_t l = 0; l < expert.layers.size(); ++l) {
    models::FfnExpert& ffn = expert.layers[l];
    const models::SlotBase& base = model->base(ffn_slot(l));
    const auto cut = [&](const char* name, const at::Tensor& tuned, const at::Tensor& frozen) {
      if (spec.subspace_seed)
        return random_subspace_of(tuned, frozen.cpu(), spec.rank,
                                  core::derive_seed(*spec.subspace_seed, fmt::format("{}/{}", l, name)));
      const Spectrum spectrum = spectrum_of_difference(tuned, frozen.cpu());
      spectra.emplace_back(fmt::format("spectrum.{}.{}", l, name), spectrum.s);
      return low_rank_of(spectrum, spec.rank);
    };
    ffn.gate_delta = cut("gate_proj", ffn.gate, base.gate);
    ffn.up_delta = cut("up_proj", ffn.up, base.up);
    ffn.down_delta = cut("down_proj", ffn.down, base.down);
    ffn.gate = ffn.up = ffn.down = at::Tensor();
    context.progress(static_cast<double>(l + 1), static_cast<double>(expert.layers.size()));
  }
  return write_expert(expert,
                      {{"base", spec.base},
                       {"base_tensors", artefact->meta().at("base_tensors")},
                       {"extracted_from", unit.inputs.at(0)}},
                      std::move(spectra));
}

core::ArtefactPtr FlexMore::evaluate_unit(const Unit& unit, WorkerContext& context) const {
  const auto spec = core::from_spec(EvaluateSpec::schema(), unit.spec);
  auto model = load_base(spec, context)->share();
  const auto text = load_text(spec.data, context);
  if (spec.what == "btm") {
    const Evaluation result = evaluate_branch_train_merge(unit, spec, model, *text, context);
    return core::Artefact::create("evaluation", {{"result", result.to_json()}}, {});
  }
  Mixture mixture;
  if (spec.what == "expert") {
    mixture.public_rows = public_rows(*context.artefact(unit.inputs.at(0)), spec.public_rows.value());
    mixture.experts = {read_expert(*context.artefact(unit.inputs.at(1)), spec.rank)};
    if (spec.scale) mixture.experts = {with_scaled_change(mixture.experts.front(), model, *spec.scale)};
  } else if (spec.what == "mixture") {
    mixture = read_mixture(*context.artefact(unit.inputs.at(0)));
  } else if (spec.what == "soup") {
    attach_dense(model, read_expert(*context.artefact(unit.inputs.at(0)), 0).layers);
  }
  std::vector<std::shared_ptr<models::MixtureFfn>> layers;
  if (spec.mixture) layers = attach(model, mixture, mixture_options(*spec.mixture));
  for (auto& layer : layers) layer->record_load(true);
  const Evaluation result = evaluate(model, *text, spec.sequences, spec.batch_size, context);
  core::Json meta = {{"result", result.to_json()}};
  if (!layers.empty()) meta["load"] = load_json(layers, mixture);
  return core::Artefact::create("evaluation", std::move(meta), {});
}

core::ArtefactPtr FlexMore::merge_experts(const Unit& unit, WorkerContext& context) const {
  const at::NoGradGuard no_grad;
  const auto spec = core::from_spec(MergeSpec::schema(), unit.spec);
  const auto model = load_base(spec, context);
  const auto rows = public_rows(*context.artefact(unit.inputs.at(0)), spec.public_rows);
  std::vector<core::ArtefactPtr> experts;
  for (size_t i = 0; i < spec.ranks.size(); ++i) experts.push_back(context.artefact(unit.inputs.at(i + 1)));
  const core::Json base_fingerprint = fingerprint_of_base(model->weights(), rows);
  return write_mixture(merge(experts, spec.ranks, rows, base_fingerprint), {{"base", spec.base}});
}

core::ArtefactPtr FlexMore::make_soup(const Unit& unit, WorkerContext& context) const {
  const at::NoGradGuard no_grad;
  const auto spec = core::from_spec(SoupSpec::schema(), unit.spec);
  const std::vector<Expert> experts = read_experts(unit, 0, spec.base, context);
  Expert mean = experts.front();
  mean.name = "soup";
  mean.layers = soup(experts);
  return write_expert(mean, {{"base", spec.base}, {"of", experts.size()}});
}

}  // namespace moraine::algorithms::flexmore
