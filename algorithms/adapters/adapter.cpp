#include "algorithms/adapters/adapter.h"

#include <algorithm>
#include <functional>
#include <set>

#include <ATen/core/grad_mode.h>
#include <fmt/ranges.h>

#include "algorithms/adapters/peft_files.h"
#include "core/error.h"
#include "core/safetensors.h"
#include "models/tensor_io.h"

namespace moraine::algorithms::adapters {
namespace {

void sort_by_name(models::NamedTensors& tensors) {
  std::ranges::sort(tensors, {}, &std::pair<std::string, at::Tensor>::first);
}

/// Compares names and shapes of a file with what the adapter has; reports all differences at once. The file may hold
/// more, where `is_beside` says so.
void check_tensors(const core::Safetensors& file, const models::NamedTensors& wanted,
                   const std::function<bool(const std::string&)>& is_beside) {
  std::vector<std::string> problems;
  std::set<std::string> expected;
  for (const auto& [name, tensor] : wanted) {
    expected.insert(name);
    const core::TensorView* view = file.find(name);
    if (view == nullptr) {
      problems.push_back("missing " + name);
    } else if (view->shape != tensor.sizes().vec()) {
      problems.push_back(fmt::format("{} is [{}], expected [{}]", name, fmt::join(view->shape, ", "),
                                     fmt::join(tensor.sizes().vec(), ", ")));
    }
  }
  for (const core::TensorView& view : file.tensors()) {
    if (!expected.contains(view.name) && !is_beside(view.name)) problems.push_back("left over " + view.name);
  }
  if (problems.empty()) return;
  throw core::UserError(fmt::format("algorithms/adapters: {} does not fit its configuration and this model:\n  {}",
                                    file.origin(), fmt::join(problems, "\n  ")),
                        "use the base model the adapter was trained on, and the configuration it was saved with");
}

/// Slot paths in a file's names become those of the model whose backbone has this prefix.
void insert_prefix(const std::string& prefix, models::NamedTensors& tensors) {
  const std::string before = peft_name("");
  for (auto& [name, tensor] : tensors)
    if (name.starts_with(before)) name.insert(before.size(), prefix);
}

/// Puts a classifier beside an adapter's tensors, as PEFT keeps one: the backbone's modules are then those of the model
/// with the classifier.
void add_classifier(const PeftClassifier& classifier, models::NamedTensors& tensors, core::Json& peft) {
  insert_prefix(classifier.prefix, tensors);
  for (const auto& [name, tensor] : classifier.tensors) tensors.emplace_back(peft_name(name), tensor);
  sort_by_name(tensors);
  peft["modules_to_save"] = {classifier.module};
  if (!classifier.task_type.empty()) peft["task_type"] = classifier.task_type;
  if (classifier.prefix.empty()) return;
  const std::string module = classifier.prefix.substr(0, classifier.prefix.size() - 1);
  for (const char* key :
       {"target_modules", "exclude_modules", "feedforward_modules"})               // a text is a regular expression
    if (peft.contains(key) && peft[key].is_string() && peft[key] != "all-linear")  // for whole paths
      peft[key] = fmt::format("{}\\.(?:{})", module, peft[key].get<std::string>());
}

/// Fills an adapter's tensors from a file, in the file's type or `dtype`; leaves stay leaves.
void read_tensors(const core::Safetensors& file, const models::NamedTensors& tensors,
                  std::optional<at::ScalarType> dtype) {
  const at::NoGradGuard no_grad;
  for (auto [name, tensor] : tensors) {
    const at::Tensor stored = models::copy_of(*file.find(name));
    if (stored.is_floating_point() != tensor.is_floating_point())
      throw core::UserError(fmt::format("algorithms/adapters: {}: {} is of a wrong type", file.origin(), name),
                            "save the adapter in float32, bfloat16 or float16");
    const bool is_index = !tensor.is_floating_point();
    tensor.set_data(stored.to(tensor.device(), is_index ? tensor.scalar_type() : dtype.value_or(stored.scalar_type())));
  }
}

/// Patterns of a recipe in the order they are tried in, so that what is written down says it.
AdapterConfig in_order(AdapterConfig config) {
  std::ranges::stable_sort(config.rank_pattern, {}, &ModuleRank::module);
  std::ranges::stable_sort(config.alpha_pattern, {}, &ModuleAlpha::module);
  return config;
}

}  // namespace

Adapter Adapter::make(const AdapterConfig& config, std::vector<Target> targets, const models::Backbone* model,
                      uint64_t seed, at::Device device, bool fresh, const Calibration* calibration) {
  const Parametrisation& type = parametrisation(config.type);
  MORAINE_CHECK(model != nullptr || !(type.traits().reads_base || starts_from_base(config)),
                "an adapter of type {} needs the base's weights", config.type);
  Adapter adapter;
  adapter.config_ = config;
  adapter.targets_ = std::move(targets);
  const auto shared = [&](const std::string& name, const std::function<at::Tensor()>& make_one) {
    const auto known = adapter.shared_.find(name);
    return known != adapter.shared_.end() ? known->second : adapter.shared_.emplace(name, make_one()).first->second;
  };
  const Wants wants = fresh ? type.wants(config) : Wants::kNothing;
  const auto add = [&](size_t i, const at::Tensor& found) {
    const Target& target = adapter.targets_[i];
    adapter.functions_.push_back(type.make({.target = target,
                                            .targets = adapter.targets_,
                                            .config = adapter.config_,
                                            .base = model ? &model->base(target.slot.path) : nullptr,
                                            .seed = seed,
                                            .device = device,
                                            .fresh = fresh,
                                            .gradient = wants == Wants::kGradients ? found : at::Tensor(),
                                            .input_moments = wants == Wants::kInputMoments ? found : at::Tensor(),
                                            .first_learning_rate = calibration ? calibration->first_learning_rate : 0,
                                            .shared = shared}));
  };
  if (wants == Wants::kNothing) {
    for (size_t i = 0; i < adapter.targets_.size(); ++i) add(i, {});
    return adapter;
  }
  if (calibration == nullptr)
    throw core::UserError(
        fmt::format("algorithms/adapters: this adapter of type {} starts from examples, which this procedure does not "
                    "give it",
                    config.type),
        "use it with method: finetune, or choose another type, init or mask");
  const auto& of_targets = wants == Wants::kGradients ? calibration->gradients : calibration->input_moments;
  of_targets(adapter.targets_, option_of(config, "examples").get<int64_t>(), add);
  MORAINE_CHECK_EQ(adapter.functions_.size(), adapter.targets_.size());
  return adapter;
}

Adapter Adapter::create(const AdapterConfig& config, const models::Backbone& model, uint64_t seed, at::Device device) {
  return make(in_order(config), targets_of(config, model.slots()), &model, seed, device, /*fresh=*/true);
}

Adapter Adapter::create(const AdapterConfig& config, const models::Backbone& model, uint64_t seed, at::Device device,
                        const Calibration& calibration) {
  return make(in_order(config), targets_of(config, model.slots()), &model, seed, device, /*fresh=*/true, &calibration);
}

Adapter Adapter::create(const AdapterConfig& config, std::span<const models::Slot> slots, uint64_t seed,
                        at::Device device) {
  return make(in_order(config), targets_of(config, slots), nullptr, seed, device, /*fresh=*/true);
}

Adapter Adapter::blank(const AdapterConfig& config, const models::Backbone& model, uint64_t seed, at::Device device) {
  return make(in_order(config), targets_of(config, model.slots()), &model, seed, device, /*fresh=*/false);
}

Adapter Adapter::from_artefact(const core::Artefact& artefact, const models::Backbone& model, at::Device device) {
  const auto stored = artefact.meta().find("adapter");
  if (artefact.kind() != "adapter" || stored == artefact.meta().end())
    throw core::UserError(
        fmt::format("algorithms/adapters: {} (kind '{}') holds no adapter", artefact.file().origin(), artefact.kind()));
  const AdapterConfig config = adapter_schema().from_json(*stored, artefact.file().origin());
  Adapter adapter = make(config, targets_of(config, model.slots(), Matching::kAnyName), &model,
                         artefact.meta().value("seed", uint64_t{0}), device,
                         /*fresh=*/false);
  models::NamedTensors all = adapter.parameters();
  for (auto& entry : adapter.state()) all.push_back(std::move(entry));
  check_tensors(artefact.file(), all, [](const std::string& name) { return name.starts_with("head."); });
  read_tensors(artefact.file(), all, std::nullopt);
  return adapter;
}

Adapter Adapter::load(const std::filesystem::path& directory, const models::Backbone& model,
                      std::optional<at::ScalarType> dtype, at::Device device) {
  return load(read_peft_directory(directory), model, dtype, device);
}

Adapter Adapter::load(const PeftDirectory& read, const models::Backbone& model, std::optional<at::ScalarType> dtype,
                      at::Device device) {
  Adapter adapter =
      make(read.config, targets_of(read.config, model.slots(), Matching::kAnyName), &model, 0, device, /*fresh=*/false);
  if (read.prefix.empty() && read.classifier.empty()) adapter.peft_ = read.json;
  models::NamedTensors tensors = adapter.in_peft_file(&SlotAdapter::parameters);
  insert_prefix(read.prefix, tensors);
  check_tensors(read.file, tensors, [&](const std::string& name) {
    return std::ranges::find(read.classifier, name, &core::TensorView::name) != read.classifier.end();
  });
  read_tensors(read.file, tensors, dtype);
  return adapter;
}

void Adapter::save(const std::filesystem::path& directory, const std::string& base_model,
                   const PeftClassifier& classifier) const {
  models::NamedTensors tensors = in_peft_file(&SlotAdapter::peft_tensors);
  core::Json peft = peft_.is_null() ? parametrisation(config_.type).peft_config(config_) : peft_;
  if (!classifier.tensors.empty()) add_classifier(classifier, tensors, peft);
  for (auto& [name, tensor] : tensors) tensor = tensor.detach().to(at::kCPU).contiguous();
  std::vector<at::Tensor> keep;
  // Patterns of a recipe are tried in alphabetical order, those of a file in the file's.
  write_peft_directory(directory, peft, peft_.is_null() ? AdapterConfig{} : config_, models::views_of(tensors, keep),
                       base_model);
}

core::ArtefactPtr Adapter::to_artefact(core::Json meta, uint64_t seed, models::NamedTensors beside) const {
  models::NamedTensors tensors = parameters();
  for (auto& entry : beside) tensors.push_back(std::move(entry));
  for (auto& entry : state()) tensors.push_back(std::move(entry));
  sort_by_name(tensors);
  for (auto& [name, tensor] : tensors) tensor = tensor.detach().to(at::kCPU).contiguous();
  std::vector<at::Tensor> keep;
  meta["seed"] = seed;
  meta["adapter"] = adapter_schema().to_json(config_);
  return core::Artefact::create("adapter", std::move(meta), models::views_of(tensors, keep));
}

bool can_be_truncated(const AdapterConfig& config) {
  const bool plain = config.type == "lora" && !starts_from_base(config) && config.rank_pattern.empty();
  return plain || parametrisation(config.type).traits().nested_ranks;
}

bool ranks_stand_alone(const AdapterConfig& config) {
  return can_be_truncated(config) && !config.options.value("as_trained", false);
}

Adapter Adapter::truncated(int64_t rank, const models::Backbone& model) const {
  if (!can_be_truncated(config_))
    throw core::UserError(
        fmt::format("algorithms/adapters: an adapter of type {} has no first ranks to cut it to", config_.type),
        "train a nested one to use it at lower ranks: dylora or matryoshka");
  if (rank < 1 || rank > config_.rank)
    throw core::UserError(fmt::format("algorithms/adapters: no rank {} in an adapter of rank {}", rank, config_.rank),
                          fmt::format("choose one from 1 to {}", config_.rank));
  AdapterConfig config = config_;
  config.type = "lora";
  config.options = core::Json::object();
  config.rank = rank;
  if (config_.type == "lora")  // its pairs keep the strength they were trained with
    config.alpha = scale_of(config_.alpha, config_.rank, config_.use_rslora) / scale_of(1, rank, config_.use_rslora);
  Adapter cut = make(config, targets_of(config, model.slots()), nullptr, 0, model.device(), /*fresh=*/false);
  const at::NoGradGuard no_grad;
  const models::NamedTensors whole = parameters();
  const TrainedTensors traits = cut.trained();
  models::NamedTensors parts = cut.parameters();
  for (size_t i = 0; i < parts.size(); ++i) {
    const int64_t ranks_at = traits.at(parts[i].first).traits.ranks_at.value();
    parts[i].second.set_data(whole[i].second.detach().narrow(ranks_at, 0, rank).clone());
  }
  return cut;
}

void Adapter::attach(models::Backbone& model) const {
  for (size_t i = 0; i < targets_.size(); ++i) model.attach(targets_[i].slot.path, functions_[i]);
}

void Adapter::detach(models::Backbone& model) const {
  for (const Target& target : targets_) model.detach(target.slot.path);
}

models::NamedTensors Adapter::named(models::NamedTensors (SlotAdapter::*of)() const) const {
  models::NamedTensors all;
  for (size_t i = 0; i < targets_.size(); ++i)
    for (const auto& [name, tensor] : (functions_[i].get()->*of)())
      all.emplace_back(targets_[i].slot.path + "." + name, tensor);
  sort_by_name(all);
  return all;
}

models::NamedTensors Adapter::parameters() const {
  models::NamedTensors all;
  for (size_t i = 0; i < targets_.size(); ++i)
    for (const auto& [name, tensor] : functions_[i]->parameters())
      all.emplace_back(targets_[i].slot.path + "." + name, tensor);
  for (const auto& [name, tensor] : shared_)
    if (tensor.requires_grad()) all.emplace_back("shared." + name, tensor);
  sort_by_name(all);
  return all;
}

TrainedTensors Adapter::trained() const {
  const Parametrisation& type = parametrisation(config_.type);
  TrainedTensors all;
  for (size_t i = 0; i < targets_.size(); ++i)
    for (const auto& [name, tensor] : functions_[i]->parameters())
      all[targets_[i].slot.path + "." + name] = {targets_[i].slot.path, type.tensor_traits(name)};
  for (const auto& [name, tensor] : shared_)
    if (tensor.requires_grad()) all["shared." + name] = {"", type.tensor_traits(name)};
  return all;
}

std::vector<ParameterGroup> Adapter::groups() const {
  if (config_.lr_ratio == 1) return {};
  ParameterGroup faster{{}, config_.lr_ratio, std::nullopt};
  for (const auto& [name, tensor] : parameters())
    if (tensor.dim() == 1 || name.find("lora_B") != std::string::npos) faster.names.push_back(name);
  return {faster};
}

models::NamedTensors Adapter::in_peft_file(models::NamedTensors (SlotAdapter::*of)() const) const {
  models::NamedTensors all;
  for (const auto& [name, tensor] : named(of)) all.emplace_back(peft_name(name), tensor);
  for (const std::string& name : parametrisation(config_.type).kept_shared(config_))
    all.emplace_back(peft_shared_name(name), shared_.at(name));
  sort_by_name(all);
  return all;
}

models::NamedTensors Adapter::state() const {
  models::NamedTensors all = named(&SlotAdapter::state);
  for (const std::string& name : parametrisation(config_.type).kept_shared(config_))
    all.emplace_back("shared." + name, shared_.at(name));
  sort_by_name(all);
  return all;
}

models::NamedTensors Adapter::deltas(const models::Backbone& model) const {
  models::NamedTensors all;
  for (size_t i = 0; i < targets_.size(); ++i) {
    const std::string& path = targets_[i].slot.path;
    const auto change = functions_[i]->delta(model.base(path));
    if (!change)
      throw core::UserError(
          fmt::format("algorithms/adapters: an adapter of type {} is no change of weights", config_.type),
          "use it beside its base model; it cannot be merged into one");
    all.emplace_back(path + ".weight", *change);
    const at::Tensor bias = functions_[i]->bias_delta(model.base(path));
    if (!bias.defined()) continue;
    if (!model.base(path).bias.defined())
      throw core::UserError(
          fmt::format("algorithms/adapters: the adapter changes the bias of {}, and this model has none there", path),
          "use it beside its base model; to merge it, train it on modules that have biases (config.json: "
          "attention_bias, mlp_bias)");
    all.emplace_back(path + ".bias", bias);
  }
  sort_by_name(all);
  return all;
}

}  // namespace moraine::algorithms::adapters
