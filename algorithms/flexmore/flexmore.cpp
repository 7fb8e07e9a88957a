#include "algorithms/flexmore/flexmore.h"

#include <ATen/core/grad_mode.h>

#include "algorithms/flexmore/experts.h"
#include "algorithms/language_model.h"
#include "core/error.h"
#include "core/file.h"
#include "core/log.h"
#include "data/text_dataset.h"
#include "models/decoder.h"
#include "models/tensor_io.h"

namespace moraine::algorithms::flexmore {
FlexMore::FlexMore(FlexMoreConfig config) : config_(std::move(config)), architecture_(public_architecture(config_.model)) {}

FlexMore::FlexMore(FlexMoreConfig config, const core::Json& inputs)
    : config_(std::move(config)), architecture_(models::DecoderConfig::from_json(inputs.at("architecture"), "recorded inputs")),
      fingerprints_(inputs.at("fingerprints").get<std::map<std::string, std::string>>()), model_id_(inputs.at("model").get<std::string>()) {}

core::Json FlexMore::inputs() const {
  return {{"architecture", architecture_.to_json()}, {"fingerprints", fingerprints_}, {"model", model_id_}};
}

std::filesystem::path FlexMore::data_path(const std::string& name) const {
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
        if (dataset.info().vocab_size > architecture_.vocab_size)
          problems.add(key, key, fmt::format("has {} token ids, the model's vocabulary is {}", dataset.info().vocab_size, architecture_.vocab_size), "use the model's own tokeniser");
      }
    } catch (const core::UserError& error) {
      problems.add(key, key, error.what(), error.hint());
    }
  };
  open("public", "public_path", config_.public_path);
  for (size_t i = 0; i < config_.domains.size(); ++i) open(config_.domains[i].name, fmt::format("domains.{}.path", i), config_.domains[i].path);
  if (config_.seq_len > architecture_.max_position_embeddings)
    problems.add("seq_len", "seq_len", fmt::format("{} is more than the model's {} positions", config_.seq_len, architecture_.max_position_embeddings));
  const int64_t smallest = std::min(architecture_.hidden_size, architecture_.intermediate_size);
  const auto check_rank = [&](const std::string& key, int64_t rank) {
    if (rank > smallest)
      problems.add(key, key, fmt::format("rank {} is above {}, the smallest side of the FFN matrices", rank, smallest), "higher ranks are the same function; use `full` for a full-size expert");
  };
  for (size_t i = 0; i < config_.domains.size(); ++i)
    if (const auto rank = fixed_rank(config_.domains[i])) check_rank(fmt::format("domains.{}.rank", i), *rank);
  for (size_t i = 0; i < config_.ranks.candidates.size(); ++i) check_rank(fmt::format("ranks.candidates.{}", i), config_.ranks.candidates[i]);
  if (config_.model.architecture && !config_.model.train)
    problems.add("model", "model.train", "is missing", "a model built from shapes must be trained on public_path before experts can use it");
  if (!config_.model.architecture) model_id_ = model_identity(config_.model.path, architecture_);
  problems.throw_if_any(config_.name);
}

void FlexMore::publish(const RunState& state, const std::filesystem::path& run_directory) const {
  const at::NoGradGuard no_grad;
  PlanBuilder builder(state);
  const Stages stages = walk(builder);
  if (!stages.base) return;
  std::optional<models::Decoder> base;
  if (model_id_.empty()) {
    const auto artefact = state.artefact(*stages.base);
    base = models::Decoder::from_tensors(architecture_, artefact->file().tensors(), artefact->file().origin(), std::nullopt, artefact);
    models::NamedTensors weights(base->weights().begin(), base->weights().end());
    write_model_directory(run_directory / "public_model", architecture_.to_json(), std::move(weights));
  } else if (stages.mixture) {
    base = models::Decoder::from_directory(config_.model.path, std::nullopt);
  }
  if (!stages.mixture) return;
  const auto artefact = state.artefact(*stages.mixture);
  models::DecoderConfig config = architecture_;
  config.family = models::DecoderConfig::Family::kFlexMore;
  config.expert_ranks = artefact->meta().at("expert_ranks").get<std::vector<int64_t>>();
  config.num_experts = static_cast<int64_t>(config.expert_ranks.size());
  config.num_experts_per_tok = config_.top_k;
  config.norm_topk_prob = config_.norm_topk_prob;
  models::NamedTensors tensors, biases;
  for (const auto& [name, weight] : base->weights()) {
    const auto at_mlp = name.find(".mlp.");
    tensors.emplace_back(at_mlp == std::string::npos ? name : name.substr(0, at_mlp) + ".mlp.experts.0." + name.substr(at_mlp + 5), weight);
  }
  for (const auto& view : artefact->file().tensors()) (view.name.ends_with(".gate.bias") ? biases : tensors).emplace_back(view.name, models::copy_of(view));
  write_model_directory(run_directory / "mixture", config.to_json(), std::move(tensors));
  if (!biases.empty()) {
    std::vector<at::Tensor> keep;
    core::write_atomically(run_directory / "mixture" / "router_bias.safetensors", core::serialize_safetensors(models::views_of(biases, keep), {{"format", "pt"}}));
    core::log::warn("the mixture's router bias has no place in the FlexMoRE format: file={} other_tools=ignore it", (run_directory / "mixture" / "router_bias.safetensors").string());
  }
}

MethodEntry method_entry() {
  return {"flexmore", "experts of any rank trained apart, merged into one mixture",
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
          [] { return flexmore_schema().json_schema(); }, [] { return flexmore_schema().markdown(); }};
}

}  // namespace moraine::algorithms::flexmore
