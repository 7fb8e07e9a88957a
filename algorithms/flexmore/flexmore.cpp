#include "algorithms/flexmore/flexmore.h"

#include <algorithm>
#include <cmath>

#include "algorithms/flexmore/direct.h"
#include "algorithms/flexmore/encoder.h"
#include "algorithms/flexmore/mixture_files.h"
#include "algorithms/language_model.h"
#include "core/error.h"
#include "data/model_tokenizer.h"
#include "data/text_dataset.h"
#include "models/decoder.h"

namespace moraine::algorithms::flexmore {

FlexMore::FlexMore(FlexMoreConfig config)
    : config_(std::move(config)), members_(members(config_)), architecture_(public_architecture(config_.model)) {}

FlexMore::FlexMore(FlexMoreConfig config, const core::Json& inputs)
    : config_(std::move(config)),
      members_(members(config_)),
      architecture_(models::DecoderConfig::from_json(inputs.at("architecture"), "recorded inputs")),
      fingerprints_(inputs.at("fingerprints").get<std::map<std::string, std::string>>()),
      model_id_(inputs.at("model").get<std::string>()),
      encoder_id_(inputs.value("encoder", "")),
      encoder_tokenizer_(inputs.value("encoder_tokenizer", "")) {}

core::Json FlexMore::inputs() const {
  core::Json out = {{"architecture", architecture_.to_json()}, {"fingerprints", fingerprints_}, {"model", model_id_}};
  if (!encoder_id_.empty()) out["encoder"] = encoder_id_, out["encoder_tokenizer"] = encoder_tokenizer_;
  return out;
}

std::filesystem::path FlexMore::data_path(const std::string& name) const {
  if (name.starts_with("encoder/")) {
    const std::string text = name.substr(std::string("encoder/").size());
    return text == "public" ? config_.public_encoder_text : domain(text).encoder_text;
  }
  return name == "public" ? config_.public_path : domain(name).path;
}

void FlexMore::open_inputs() {
  core::Problems problems;
  const auto open = [&](const std::string& name, const std::string& key, const std::string& path) {
    if (path.empty()) {
      problems.add(key, key, "is missing", "a prepared HDF5 file; make one with scripts/prepare_text.py");
      return;
    }
    try {
      for (const char* split : {"train", "validation", "test"}) {
        const auto dataset = data::TextDataset::open(data_path(name), split, config_.seq_len, config_.tokenizer);
        fingerprints_[name] = dataset.info().fingerprint;
        data::check_model_tokenizer(dataset.info(), data_path(name),
                                    config_.model.architecture ? "" : config_.model.path, architecture_.vocab_size);
      }
    } catch (const core::UserError& error) {
      problems.add(key, key, error.what(), error.hint());
    }
  };
  open("public", "public_path", config_.public_path);
  for (size_t i = 0; i < config_.domains.size(); ++i)
    open(config_.domains[i].name, fmt::format("domains.{}.path", i), config_.domains[i].path);
  if (config_.router.init == "encoder") {
    try {
      encoder_id_ = DomainEncoder::identity(config_.router.encoder);
      encoder_tokenizer_ = DomainEncoder::tokenizer(config_.router.encoder);
      DomainEncoder::open(config_.router.encoder, at::kCPU);
    } catch (const core::Error& error) {
      problems.add("router.encoder", "router.encoder", error.what(), error.hint());
    }
    const auto open_encoded = [&](const std::string& name, const std::string& key, const std::string& path) {
      if (path.empty())
        return problems.add(
            key, key, "is missing",
            "router.init: encoder needs the text prepared with the encoder's tokeniser (scripts/fetch_encoder)");
      try {
        fingerprints_["encoder/" + name] =
            data::TextDataset::open(path, "train", DomainEncoder::kTokens, encoder_tokenizer_).info().fingerprint;
      } catch (const core::UserError& error) {
        problems.add(key, key, error.what(), error.hint());
      }
    };
    open_encoded("public", "public_encoder_text", config_.public_encoder_text);
    for (size_t i = 0; i < config_.domains.size(); ++i)
      if (is_member(config_, config_.domains[i].name))
        open_encoded(config_.domains[i].name, fmt::format("domains.{}.encoder_text", i),
                     config_.domains[i].encoder_text);
  }
  if (config_.seq_len > architecture_.max_position_embeddings)
    problems.add("seq_len", "seq_len",
                 fmt::format("{} is more than the model's {} positions", config_.seq_len,
                             architecture_.max_position_embeddings));
  const int64_t smallest = std::min(architecture_.hidden_size, architecture_.intermediate_size);
  const auto check_rank = [&](const std::string& key, int64_t rank) {
    if (rank > smallest)
      problems.add(key, key, fmt::format("rank {} is above {}, the smallest side of the FFN matrices", rank, smallest),
                   "higher ranks are the same function; use `full` for a full-size expert");
  };
  for (size_t i = 0; i < config_.domains.size(); ++i) {
    if (const auto rank = given_rank(config_.domains[i])) check_rank(fmt::format("domains.{}.rank", i), *rank);
    check_adapter(config_.domains[i], fmt::format("domains.{}.adapter", i), problems);
  }
  for (size_t i = 0; i < config_.ranks.candidates.size(); ++i)
    check_rank(fmt::format("ranks.candidates.{}", i), config_.ranks.candidates[i]);
  check_budget(problems);
  if (config_.model.architecture && !config_.model.train)
    problems.add("model", "model.train", "is missing",
                 "a model built from shapes must be trained on public_path before experts can use it");
  if (!config_.model.architecture) model_id_ = model_identity(config_.model.path, architecture_.to_json());
  problems.throw_if_any(config_.name);
}

// An adapter has to fit the public model, and what it makes to be smaller than a full-size expert's sides.
void FlexMore::check_adapter(const DomainConfig& d, const std::string& key, core::Problems& problems) const {
  if (!d.adapter) return;
  try {
    adapter_counts(*d.adapter, architecture_);
  } catch (const core::UserError& error) {
    return problems.add(key, key, error.what(), error.hint());
  }
  const int64_t smallest = std::min(architecture_.hidden_size, architecture_.intermediate_size);
  if (trained_rank(d) > smallest)
    problems.add(key, key,
                 fmt::format("makes an expert of rank {}, above {}, the smallest side of the FFN matrices",
                             trained_rank(d), smallest),
                 "choose a smaller rank; init pissa and olora double it");
}

// A budget that no choice of ranks can keep is known from shapes: nothing need be trained to refuse it.
void FlexMore::check_budget(core::Problems& problems) const {
  const auto open = std::count_if(members_.begin(), members_.end(), chooses_rank);
  const auto& candidates = config_.ranks.candidates;
  const int64_t needed = open * *std::min_element(candidates.begin(), candidates.end());
  if (needed <= rank_limit()) return;
  const double least = static_cast<double>(needed * architecture_.low_rank_parameters(1)) /
                       static_cast<double>(architecture_.ffn_parameters() * static_cast<int64_t>(members_.size()));
  problems.add(
      "ranks.budget", "ranks.budget",
      fmt::format("{} is too little for the smallest of ranks.candidates: {} experts with rank: auto take {:.4f}"
                  " of the full-size mixture's added parameters at rank {}",
                  config_.ranks.budget, open, least, needed / open),
      fmt::format("raise it to {:.4f} or more, or add smaller ranks.candidates", std::ceil(least * 1e4) / 1e4));
}

// The public model as it is stored. Only of a run that has one.
models::Decoder FlexMore::public_model(const Stages& stages, const RunState& state) const {
  if (!model_id_.empty()) return models::Decoder::from_directory(config_.model.path, std::nullopt);
  const auto artefact = state.artefact(*stages.base);
  return models::Decoder::from_tensors(architecture_, artefact->file().tensors(), artefact->file().origin(),
                                       std::nullopt, artefact);
}

MixtureModel FlexMore::mixture_model(const std::string& id, const Stages& stages, const RunState& state) const {
  return {architecture_,
          public_model(stages, state).weights(),
          read_mixture(*state.artefact(id)),
          config_.top_k,
          config_.norm_topk_prob,
          model_id_.empty() ? "" : config_.model.path};
}

void FlexMore::publish(const RunState& state, const std::filesystem::path& run_directory) const {
  PlanBuilder builder(state);
  const Stages stages = walk(builder);
  if (stages.base && model_id_.empty()) {
    const auto base = public_model(stages, state);
    write_model_directory(run_directory / "public_model", architecture_.to_json(),
                          {base.weights().begin(), base.weights().end()});
  }
  if (stages.mixture)
    write_flexmore_directory(mixture_model(*stages.mixture, stages, state), run_directory / "mixture");
}

void FlexMore::export_as(const RunState& state, const ExportRequest& request) const {
  PlanBuilder builder(state);
  const Stages stages = walk(builder);
  const std::map<std::string, std::optional<std::string>> results = {
      {"", stages.mixture}, {"mixture", stages.mixture}, {"full_mixture", stages.full_mixture}};
  const auto id = results.find(request.what);
  if (id == results.end())
    throw core::UserError(fmt::format("algorithms/flexmore: there is no result '{}' to export", request.what),
                          "a run of this method has `mixture` (chosen ranks) and `full_mixture` (full-size experts)");
  if (!id->second)
    throw core::UserError(
        fmt::format("algorithms/flexmore: the run has no {} yet", request.what.empty() ? "mixture" : request.what),
        "`moraine ls` lists what is still to do; a full mixture needs every expert to be full-size as it was trained");
  if (!model_id_.empty() && model_identity(config_.model.path, architecture_.to_json()) != model_id_)
    throw core::UserError(
        fmt::format("algorithms/flexmore: the public model in {} is not the one the run was made with",
                    config_.model.path),
        "put the model of that time back; RUN/mixture holds a copy of its own: moraine export RUN/mixture ...");
  ExportRequest named = request;
  if (named.base_model.empty()) named.base_model = config_.model.path;
  export_mixture(mixture_model(*id->second, stages, state), named);
}

MethodEntry method_entry() {
  return {"flexmore",
          "experts of any rank trained apart, merged into one mixture",
          [](const core::ConfigNode& root, core::Problems& problems) {
            FlexMoreConfig config;
            flexmore_schema().parse(root, "", config, problems);
            ParsedRecipe recipe;
            recipe.run = config;
            flexmore_schema().resolve(root, "", config, recipe.resolved);
            recipe.values = flexmore_schema().to_json(config);
            if (problems.empty()) recipe.method = std::make_unique<FlexMore>(std::move(config));
            return recipe;
          },
          [](const core::Json& values, const core::Json& inputs) -> std::unique_ptr<Method> {
            return std::make_unique<FlexMore>(flexmore_schema().from_json(values), inputs);
          },
          [](const core::Json& values) { return flexmore_schema().identity(values); },
          [] { return flexmore_schema().json_schema(); },
          [] { return flexmore_schema().markdown(); }};
}

}  // namespace moraine::algorithms::flexmore
