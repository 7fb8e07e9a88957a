// A mixture as files of other tools: FlexMoRE keys, FlexOlmo, PEFT.
#include "algorithms/flexmore/mixture_files.h"

#include <algorithm>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/stack.h>

#include "algorithms/adapters/config.h"
#include "algorithms/adapters/lora.h"
#include "algorithms/adapters/peft_files.h"
#include "core/checksums.h"
#include "core/error.h"
#include "core/file.h"
#include "core/file_name.h"
#include "core/hash.h"
#include "core/log.h"
#include "core/registry.h"
#include "models/checkpoint.h"
#include "models/olmo_core.h"
#include "models/tensor_io.h"
#include "models/weights.h"

namespace moraine::algorithms::flexmore {
namespace {

namespace fs = std::filesystem;
using models::DecoderConfig;

constexpr const char* kBiasFile = "router_bias.safetensors";
constexpr const char* kNames = "_expert_names";  // transformers keeps keys it does not know

struct Projection {
  const char* name;
  at::Tensor models::FfnExpert::*full;
  models::LowRank models::FfnExpert::*delta;
};
constexpr Projection kProjections[] = {{"gate_proj", &models::FfnExpert::gate, &models::FfnExpert::gate_delta},
                                       {"up_proj", &models::FfnExpert::up, &models::FfnExpert::up_delta},
                                       {"down_proj", &models::FfnExpert::down, &models::FfnExpert::down_delta}};

bool has_bias(const Mixture& mixture) {
  return std::any_of(mixture.experts.begin(), mixture.experts.end(), [](const Expert& e) { return !e.biases.empty(); });
}

core::Json expert_names(const Mixture& mixture) {
  core::Json names = {"public"};
  for (const auto& expert : mixture.experts) names.push_back(expert.name);
  return names;
}

DecoderConfig mixture_config(const MixtureModel& model, DecoderConfig::Family family) {
  DecoderConfig config = model.base;
  config.family = family;
  config.num_experts = static_cast<int64_t>(model.mixture.experts.size()) + 1;
  config.num_experts_per_tok = model.top_k;
  config.norm_topk_prob = model.norm_topk_prob;
  if (family != DecoderConfig::Family::kFlexMore) return config;
  config.expert_ranks = {0};
  for (const auto& expert : model.mixture.experts) config.expert_ranks.push_back(expert.rank());
  return config;
}

// Key of a tensor of the public model inside a mixture: its FFN is expert 0.
std::string key_in_mixture(const std::string& name) {
  const auto at_mlp = name.find(".mlp.");
  return at_mlp == std::string::npos ? name : name.substr(0, at_mlp) + ".mlp.experts.0." + name.substr(at_mlp + 5);
}

models::LazyTensor lazy(std::string name, const at::Tensor& tensor, at::ScalarType dtype) {
  return {std::move(name), tensor.numel() * static_cast<int64_t>(c10::elementSize(dtype)),
          [tensor, dtype] { return tensor.to(dtype).contiguous(); }};
}

at::ScalarType widest_type(const MixtureModel& model) {
  at::ScalarType widest = model.base_weights.begin()->second.scalar_type();
  const auto add = [&](const at::Tensor& t) {
    if (t.defined()) widest = c10::promoteTypes(widest, t.scalar_type());
  };
  for (const auto& [name, weight] : model.base_weights) add(weight);
  for (const auto& row : model.mixture.public_rows) add(row);
  for (const auto& expert : model.mixture.experts)
    for (size_t l = 0; l < expert.layers.size(); ++l) {
      add(expert.router_rows[l]);
      for (const auto& p : kProjections) {
        add(expert.layers[l].*p.full);
        add((expert.layers[l].*p.delta).a);
      }
    }
  return widest;
}

void require_low_rank(const Expert& expert) {
  if (expert.rank() == 0)
    throw core::UserError(
        fmt::format("algorithms/flexmore: expert '{}' is full-size and has no low-rank form", expert.name),
        "--experts chooses the low-rank ones; --to flexolmo or hf exports any");
}

// Names of the experts 1 and up. They become file names in exports and imports.
std::vector<std::string> names_in(const core::Json& json, int64_t experts, const std::string& origin) {
  std::vector<std::string> names;
  const core::Json listed = json.value(kNames, core::Json());
  if (listed.is_null()) {
    for (int64_t e = 1; e < experts; ++e) names.push_back(fmt::format("expert{}", e));
    return names;
  }
  const auto text = [](const core::Json& name) { return name.is_string(); };
  if (!listed.is_array() || static_cast<int64_t>(listed.size()) != experts ||
      !std::all_of(listed.begin(), listed.end(), text))
    throw core::UserError(fmt::format("algorithms/flexmore: {}: '{}' is no list of {} names", origin, kNames, experts),
                          "name every expert, the public one first, or remove the key");
  for (auto name = listed.begin() + 1; name != listed.end(); ++name) {
    names.push_back(core::check_file_name(name->get<std::string>(), "an expert", origin));
    if (std::count(names.begin(), names.end(), names.back()) > 1)
      throw core::UserError(fmt::format("algorithms/flexmore: {}: two experts are named '{}'", origin, names.back()),
                            "rename one in '_expert_names'");
  }
  return names;
}

void attach_to(const core::Safetensors& biases, MixtureModel& model) {
  for (size_t l = 0; l < model.mixture.public_rows.size(); ++l) {
    const std::string name = ffn_slot(l) + ".gate.bias";
    const core::TensorView* view = biases.find(name);
    const auto experts = static_cast<int64_t>(model.mixture.experts.size());
    if (view == nullptr || view->shape != std::vector<int64_t>{experts})
      throw core::UserError(
          fmt::format("algorithms/flexmore: {}: '{}' is missing or has not {} values", biases.origin(), name, experts),
          "one bias per expert but the public one");
    const at::Tensor bias = models::copy_of(*view);
    for (int64_t e = 0; e < experts; ++e)
      model.mixture.experts[static_cast<size_t>(e)].biases.push_back(bias.narrow(0, e, 1).contiguous());
  }
}

}  // namespace

MixtureModel read_mixture_directory(const fs::path& directory) {
  const fs::path config_path = directory / "config.json";
  const core::Json json = core::read_json(config_path);
  const DecoderConfig config = DecoderConfig::from_json(json, config_path.string());
  if (!config.is_mixture())
    throw core::UserError(fmt::format("algorithms/flexmore: {} is no mixture (model_type {})", config_path.string(),
                                      json.at("model_type").dump()),
                          "name a directory with model_type flex_olmo or flexmore");
  const auto files = std::make_shared<const core::ShardedSafetensors>(core::ShardedSafetensors::open(directory));
  models::OwnedViews named = models::hugging_face_layout(files->tensors(), files, directory.string());
  named.tensors = models::without_redundant(std::move(named.tensors), config, directory.string());
  models::require_plausible_layers(config.num_layers, config.num_experts, named.tensors.size(), directory.string());
  const auto expected = models::expected_tensors(config);
  std::map<std::string, at::Tensor> tensors;
  for (const auto* view : models::match_tensors(expected, named.tensors, directory.string()))
    tensors.emplace(view->name, models::borrow(*view, named.owner));

  MixtureModel model{config, {}, {}, config.num_experts_per_tok, config.norm_topk_prob, directory};
  model.base.family = DecoderConfig::Family::kOlmo2;
  model.base.num_experts = model.base.num_experts_per_tok = 1;
  model.base.norm_topk_prob = false;
  model.base.expert_ranks.clear();
  for (const auto& [name, shape] : models::expected_tensors(model.base))
    model.base_weights.emplace(name, tensors.at(key_in_mixture(name)));
  for (const std::string& name : names_in(json, config.num_experts, config_path.string()))
    model.mixture.experts.push_back({name, {}, {}, {}});
  for (int64_t l = 0; l < config.num_layers; ++l) {
    const std::string mlp = ffn_slot(static_cast<size_t>(l));
    const at::Tensor& rows = tensors.at(mlp + ".gate.weight");
    model.mixture.public_rows.push_back(rows[0].contiguous());
    for (int64_t e = 1; e < config.num_experts; ++e) {
      models::FfnExpert ffn;
      for (const auto& p : kProjections) {
        const std::string path = fmt::format("{}.experts.{}.{}", mlp, e, p.name);
        if (config.rank_of(e) == 0) {
          ffn.*p.full = tensors.at(path + ".weight");
        } else {
          ffn.*p.delta = {tensors.at(path + "_a.weight"), tensors.at(path + "_b.weight")};
        }
      }
      Expert& expert = model.mixture.experts[static_cast<size_t>(e - 1)];
      expert.layers.push_back(std::move(ffn));
      expert.router_rows.push_back(rows[e].contiguous());
    }
  }
  if (fs::exists(directory / kBiasFile)) attach_to(core::open_checked(directory / kBiasFile), model);
  return model;
}

void write_flexmore_directory(const MixtureModel& model, const fs::path& directory) {
  const at::NoGradGuard no_grad;
  std::vector<models::LazyTensor> tensors;
  models::NamedTensors biases;
  for (const auto& [name, weight] : model.base_weights)
    tensors.push_back(lazy(key_in_mixture(name), weight, weight.scalar_type()));
  const auto artefact = write_mixture(model.mixture, core::Json::object());
  for (const auto& view : artefact->file().tensors()) {
    const at::Tensor tensor = models::borrow(view, artefact);
    if (view.name.ends_with(".gate.bias")) {
      biases.emplace_back(view.name, tensor);
    } else {
      tensors.push_back(lazy(view.name, tensor, tensor.scalar_type()));
    }
  }
  core::Json config = mixture_config(model, DecoderConfig::Family::kFlexMore).to_json();
  config[kNames] = expert_names(model.mixture);
  models::write_checkpoint(directory, config, std::move(tensors));
  models::copy_companions(model.source, directory);
  if (biases.empty()) {
    fs::remove(directory / kBiasFile);  // of an earlier mixture
    return;
  }
  std::vector<at::Tensor> keep;
  const auto bytes = core::serialize_safetensors(models::views_of(biases, keep), {{"format", "pt"}});
  core::write_atomically(directory / kBiasFile, bytes);
  core::Checksums sums = core::read_checksums(directory);
  sums[kBiasFile] = core::sha256(bytes);
  core::write_checksums(directory, sums);
  core::log::warn("the mixture's router bias has no place in the FlexMoRE format: file={} other_tools=ignore it",
                  (directory / kBiasFile).string());
}

void write_flexolmo_directory(const MixtureModel& model, const fs::path& directory, std::optional<at::ScalarType> dtype,
                              bool olmo_core) {
  const at::NoGradGuard no_grad;
  if (has_bias(model.mixture))
    throw core::UserError("algorithms/flexmore: a FlexOlmo model has no place for this mixture's router bias",
                          "--to hf keeps it in router_bias.safetensors; or train with router.bias: none");
  const at::ScalarType type = dtype.value_or(widest_type(model));
  std::vector<models::LazyTensor> tensors;
  for (const auto& [name, weight] : model.base_weights) tensors.push_back(lazy(key_in_mixture(name), weight, type));
  for (size_t l = 0; l < model.mixture.public_rows.size(); ++l) {
    std::vector<at::Tensor> rows = {model.mixture.public_rows[l].to(type)};
    for (size_t e = 0; e < model.mixture.experts.size(); ++e) {
      const Expert& expert = model.mixture.experts[e];
      rows.push_back(expert.router_rows[l].to(type));
      for (const auto& p : kProjections) {
        const std::string name = fmt::format("{}.experts.{}.{}.weight", ffn_slot(l), e + 1, p.name);
        if (expert.rank() == 0) {
          tensors.push_back(lazy(name, expert.layers[l].*p.full, type));
          continue;
        }
        const at::Tensor base = model.base_weights.at(fmt::format("{}.{}.weight", ffn_slot(l), p.name));
        const models::LowRank delta = expert.layers[l].*p.delta;
        tensors.push_back(
            {name, base.numel() * static_cast<int64_t>(c10::elementSize(type)), [=] {
               return (base.to(at::kDouble) + at::matmul(delta.b.to(at::kDouble), delta.a.to(at::kDouble))).to(type);
             }});
      }
    }
    tensors.push_back(lazy(ffn_slot(l) + ".gate.weight", at::stack(rows), type));
  }
  core::Json config = mixture_config(model, DecoderConfig::Family::kFlexOlmo).to_json();
  config[kNames] = expert_names(model.mixture);
  models::write_checkpoint(directory, config,
                           olmo_core ? models::to_olmo_core(std::move(tensors)) : std::move(tensors));
  models::copy_companions(model.source, directory);
}

void write_peft_expert(const Expert& expert, const fs::path& directory, const std::string& base_model) {
  require_low_rank(expert);
  adapters::AdapterConfig config;
  config.rank = expert.rank();
  config.alpha = static_cast<double>(config.rank);
  config.target_modules.clear();
  models::NamedTensors factors;
  for (const auto& p : kProjections) {
    config.target_modules.emplace_back(p.name);
    for (size_t l = 0; l < expert.layers.size(); ++l) {
      const std::string slot = fmt::format("{}.{}", ffn_slot(l), p.name);
      factors.emplace_back(adapters::peft_name(slot + ".lora_A.weight"), (expert.layers[l].*p.delta).a);
      factors.emplace_back(adapters::peft_name(slot + ".lora_B.weight"), (expert.layers[l].*p.delta).b);
    }
  }
  core::Json peft = adapters::lora_peft_config(config);
  peft["task_type"] = "CAUSAL_LM";
  std::vector<at::Tensor> keep;
  adapters::write_peft_directory(directory, std::move(peft), {}, models::views_of(factors, keep), base_model);
}

MixtureModel keep_experts(MixtureModel model, const std::vector<std::string>& names) {
  std::vector<std::string> known;
  for (const auto& expert : model.mixture.experts) known.push_back(expert.name);
  for (const auto& name : names)
    if (std::find(known.begin(), known.end(), name) == known.end())
      throw core::UserError(fmt::format("algorithms/flexmore: the mixture has no expert '{}'", name),
                            core::name_hint(name, known));
  if (!names.empty())
    std::erase_if(model.mixture.experts,
                  [&](const Expert& e) { return std::find(names.begin(), names.end(), e.name) == names.end(); });
  model.top_k = std::min(model.top_k, static_cast<int64_t>(model.mixture.experts.size()) + 1);
  return model;
}

void export_mixture(MixtureModel all, const ExportRequest& request) {
  const MixtureModel model = keep_experts(std::move(all), request.experts);
  if (request.format == "peft") {
    if (model.mixture.experts.empty())
      throw core::UserError("algorithms/flexmore: the mixture has no expert beside the public one",
                            "there is nothing to write as an adapter");
    for (const auto& expert : model.mixture.experts) require_low_rank(expert);  // before anything is written
    for (const auto& expert : model.mixture.experts)
      write_peft_expert(expert, request.directory / core::check_file_name(expert.name, "an expert", "the mixture"),
                        request.base_model);
  } else if (request.format == "flexolmo" || request.format == "olmo_core") {
    const auto dtype =
        request.dtype.empty() ? std::nullopt : std::optional(request.dtype == "bfloat16" ? at::kBFloat16 : at::kFloat);
    write_flexolmo_directory(model, request.directory, dtype, request.format == "olmo_core");
  } else {
    if (!request.dtype.empty())
      throw core::UserError("algorithms/flexmore: FlexMoRE keys keep every tensor as it is stored",
                            "leave out --dtype, or use --to flexolmo");
    write_flexmore_directory(model, request.directory);
  }
  if (request.format != "peft" && !fs::exists(request.directory / "tokenizer.json"))
    core::log::info("no tokenizer was written, the public model has none beside it: other tools need one: directory={}",
                    request.directory.string());
}

models::Decoder assemble(const MixtureModel& model, at::ScalarType dtype) {
  models::NamedTensors weights(model.base_weights.begin(), model.base_weights.end());
  std::vector<at::Tensor> keep;
  auto decoder = models::Decoder::from_tensors(model.base, models::views_of(weights, keep), "public model", dtype);
  attach(decoder, model.mixture, {.top_k = model.top_k, .norm_topk_prob = model.norm_topk_prob});
  return decoder;
}

}  // namespace moraine::algorithms::flexmore
