// What a worker does for FlexMoRE: trains, extracts, evaluates. Merges run on the coordinator through the same door.
#include <algorithm>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/stack.h>

#include "algorithms/evaluate.h"
#include "algorithms/flexmore/comparisons.h"
#include "algorithms/flexmore/encoder.h"
#include "algorithms/flexmore/experts.h"
#include "algorithms/flexmore/flexmore.h"
#include "algorithms/flexmore/phlora.h"
#include "algorithms/flexmore/router_rows.h"
#include "algorithms/language_model.h"
#include "core/error.h"
#include "core/hash.h"
#include "data/text_dataset.h"
#include "models/tensor_io.h"

namespace moraine::algorithms::flexmore {
namespace {

models::MixtureFfn::Options mixture_options(const MixtureSpec& spec) {
  const auto forward =
      spec.forward == "per_expert" ? models::MixtureForward::kPerExpert : models::MixtureForward::kFactored;
  return {spec.top_k, spec.norm_topk_prob, forward, mixture_kernels(spec.kernels)};
}

at::ScalarType type_of(const std::string& dtype) { return dtype == "bfloat16" ? at::kBFloat16 : at::kFloat; }

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
