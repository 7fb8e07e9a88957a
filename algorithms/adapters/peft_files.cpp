#include "algorithms/adapters/peft_files.h"

#include <algorithm>
#include <cctype>
#include <map>
#include <set>

#include <fmt/ranges.h>

#include "algorithms/adapters/lora.h"
#include "core/checksums.h"
#include "core/error.h"
#include "core/file.h"
#include "core/hash.h"
#include "models/open_backbone.h"

namespace moraine::algorithms::adapters {
namespace {

constexpr std::string_view kPrefix = "base_model.model.";
constexpr const char* kTensors = "adapter_model.safetensors";
constexpr std::string_view kA = ".lora_A.weight", kB = ".lora_B.weight";

struct Pair {
  const core::TensorView *a = nullptr, *b = nullptr;
};

/// The file's factors by slot path; what is none goes to `problems`.
std::map<std::string, Pair> pairs_of(const core::Safetensors& file, std::vector<std::string>& problems) {
  std::map<std::string, Pair> pairs;
  for (const core::TensorView& tensor : file.tensors()) {
    const bool is_a = tensor.name.ends_with(kA), is_b = tensor.name.ends_with(kB);
    if (!tensor.name.starts_with(kPrefix) || (!is_a && !is_b) || tensor.shape.size() != 2) {
      problems.push_back(
          fmt::format("{} [{}] is no factor of a linear module", tensor.name, fmt::join(tensor.shape, ", ")));
      continue;
    }
    const size_t length = tensor.name.size() - kPrefix.size() - kA.size();
    (is_a ? pairs[tensor.name.substr(kPrefix.size(), length)].a : pairs[tensor.name.substr(kPrefix.size(), length)].b) =
        &tensor;
  }
  return pairs;
}

/// The modules that have factors, as slots of the model they belong to.
std::vector<models::Slot> slots_of(const std::map<std::string, Pair>& pairs, std::vector<std::string>& problems) {
  std::vector<models::Slot> slots;
  for (const auto& [path, pair] : pairs) {
    if (pair.a == nullptr || pair.b == nullptr) {
      problems.push_back(fmt::format("{} has only one of lora_A and lora_B", path));
    } else if (pair.a->shape[0] != pair.b->shape[1]) {
      problems.push_back(
          fmt::format("{}: ranks {} of lora_A and {} of lora_B", path, pair.a->shape[0], pair.b->shape[1]));
    } else {
      slots.push_back(
          {.path = path, .kind = models::SlotKind::kLinear, .in = pair.a->shape[1], .out = pair.b->shape[0]});
    }
  }
  return slots;
}

/// The modules that have tensors of the adapter, by their paths in the model with `prefix`, without it.
std::vector<std::string> modules_in(const core::Safetensors& file, const std::string& peft_type,
                                    const std::string& prefix) {
  std::string mark = "." + peft_type + "_";  // of what it puts beside a module: ".lora_A.weight"
  std::ranges::transform(mark, mark.begin(), [](unsigned char c) { return std::tolower(c); });
  const std::string before = std::string(kPrefix) + prefix;
  std::set<std::string> modules;
  for (const core::TensorView& tensor : file.tensors()) {
    const size_t end = tensor.name.rfind(mark);
    if (tensor.name.starts_with(before) && end != std::string::npos && end > before.size())
      modules.insert(tensor.name.substr(before.size(), end - before.size()));
  }
  return {modules.begin(), modules.end()};
}

/// Whether what a configuration says of modules means the same in the model without `prefix`: names of their ends do.
bool says_ends_alone(const AdapterConfig& config, const std::string& prefix) {
  const auto whole = [&](const std::string& name) { return name.find(prefix) != std::string::npos; };
  const auto whole_pattern = [&](const auto& pattern) { return whole(pattern.module); };
  return config.target_regex.empty() && config.exclude_regex.empty() &&
         std::ranges::none_of(config.target_modules, whole) && std::ranges::none_of(config.exclude_modules, whole) &&
         config.layers_to_transform.empty() && std::ranges::none_of(config.rank_pattern, whole_pattern) &&
         std::ranges::none_of(config.alpha_pattern, whole_pattern);
}

/// What a configuration says of the model with `prefix`, said of the one without: its targets become those modules that
/// have tensors.
void drop_prefix(AdapterConfig& config, const std::string& prefix, std::vector<std::string> modules) {
  if (says_ends_alone(config, prefix)) return;
  config.target_modules = std::move(modules);
  config.target_regex.clear();
  config.exclude_modules.clear();
  config.exclude_regex.clear();
  config.layers_to_transform.clear();
  const auto cut = [&](std::string& module) {
    if (const size_t at = module.find(prefix); at == 0 || (at == 1 && module[0] == '^'))
      module.erase(at, prefix.size());
  };
  for (auto& pattern : config.rank_pattern) cut(pattern.module);
  for (auto& pattern : config.alpha_pattern) cut(pattern.module);
}

/// modules_to_save, which may name the classifier alone, by its name or by those that PEFT enters for every model.
void take_saved_modules(core::OrderedJson& json, const std::string& classifier, const std::string& origin) {
  const auto saved = json.find("modules_to_save");
  if (saved == json.end() || saved->is_null()) return;
  for (const auto& module : *saved)
    if (module != classifier && module != "classifier" && module != "score")
      throw core::UserError(fmt::format("algorithms/adapters: {}: modules_to_save names {}", origin, module.dump()),
                            fmt::format("beside an adapter this model's classifier, '{}', can be trained", classifier));
  json.erase(saved);
}

/// The patterns of an imported adapter in the order of its file, which its "peft", a sorted object, has lost.
AdapterConfig patterns_as_read(const core::Json& meta) {
  AdapterConfig config;
  const core::Json lora = meta.value("lora", core::Json::object());
  const auto of_peft = [&](const char* key, const core::Json& pattern) {
    return meta.at("peft").value(key, core::Json::object()).contains(pattern.at("module").get<std::string>());
  };
  for (const auto& pattern : lora.value("rank_pattern", core::Json::array()))
    if (of_peft("rank_pattern", pattern)) config.rank_pattern.push_back({pattern.at("module"), pattern.at("rank")});
  for (const auto& pattern : lora.value("alpha_pattern", core::Json::array()))
    if (of_peft("alpha_pattern", pattern)) config.alpha_pattern.push_back({pattern.at("module"), pattern.at("alpha")});
  return config;
}

}  // namespace

void write_peft_directory(const std::filesystem::path& directory, core::Json peft, const AdapterConfig& config,
                          const std::vector<core::TensorView>& tensors, const std::string& base_model) {
  if (!base_model.empty())  // a directory by a name that holds wherever the adapter is read
    peft["base_model_name_or_path"] = std::filesystem::is_directory(base_model)
                                          ? std::filesystem::absolute(base_model).lexically_normal().string()
                                          : base_model;
  core::OrderedJson ordered = peft;
  const auto reorder = [&](const char* key, const auto& patterns) {
    if (patterns.empty()) return;
    ordered[key] = core::OrderedJson::object();
    for (const auto& pattern : patterns) ordered[key][pattern.module] = peft.at(key).at(pattern.module);
  };
  reorder("rank_pattern", config.rank_pattern);
  reorder("alpha_pattern", config.alpha_pattern);
  std::filesystem::remove(directory / core::kChecksumsFile);  // of an earlier adapter
  const auto bytes = core::serialize_safetensors(tensors, {{"format", "pt"}});
  core::write_atomically(directory / kTensors, bytes);
  core::write_atomically(directory / "adapter_config.json", ordered.dump(2, ' ', /*ensure_ascii=*/true));
  core::write_checksums(directory, {{kTensors, core::sha256(bytes)}});
}

std::string peft_name(const std::string& name) { return std::string(kPrefix) + name; }

std::string peft_shared_name(const std::string& name) { return "base_model." + name; }

std::string PeftDirectory::hash() const { return core::sha256(text + core::sha256(file.bytes().span())); }

PeftDirectory read_peft_directory(const std::filesystem::path& directory, const models::ClassifierForm* classifier) {
  const std::filesystem::path config_path = directory / "adapter_config.json";
  const std::string text = core::read_text(config_path);
  core::OrderedJson json = core::parse_ordered_json(text, config_path.string()), rest = json;
  if (classifier != nullptr) take_saved_modules(rest, classifier->module, config_path.string());
  core::Safetensors file = core::open_checked(directory / kTensors);
  PeftDirectory read{
      .json = std::move(json), .config = config_from_peft(rest, config_path.string()), .file = file, .text = text};
  const std::string peft_type = rest.at("peft_type");
  if (classifier != nullptr) {
    const std::string module = peft_name(classifier->module + ".");
    for (const core::TensorView& tensor : file.tensors())
      if (tensor.name.starts_with(module)) {
        read.classifier.push_back(tensor);
      } else if (tensor.name.starts_with(peft_name(classifier->prefix))) {
        read.prefix = classifier->prefix;
      }
  }
  const std::vector<std::string> modules = modules_in(file, peft_type, read.prefix);
  if (names_no_target(read.config)) read.config.target_modules = modules;
  if (!read.prefix.empty()) drop_prefix(read.config, read.prefix, modules);
  return read;
}

void export_adapter(const core::Artefact& adapter, const std::filesystem::path& directory,
                    const std::string& base_model) {
  const core::Json& meta = adapter.meta();
  const bool as_read = meta.contains("peft");
  const auto refuse = [&](const std::string& why) {
    throw core::UserError(
        fmt::format("algorithms/adapters: {} (kind '{}') {}", adapter.file().origin(), adapter.kind(), why),
        "only adapters made of pairs A and B on an unchanged base have a PEFT form");
  };
  if (!as_read && !meta.contains("lora")) refuse("is no LoRA adapter");
  AdapterConfig config;
  if (!as_read) config = adapter_schema().from_json(meta.at("lora"));
  if (config.type != "lora" || starts_from_base(config))
    refuse(fmt::format("is of type {}{}: one artefact of it is not all; export its run", config.type,
                       starts_from_base(config) ? ", init " + config.init : ""));
  std::vector<core::TensorView> factors;
  std::map<std::string, int> halves;
  for (const core::TensorView& tensor : adapter.file().tensors()) {
    if (tensor.name.starts_with("m.") || tensor.name.starts_with("v.")) continue;  // a server optimiser's moments
    if (!tensor.name.ends_with(kA) && !tensor.name.ends_with(kB))
      refuse(fmt::format("is more than a LoRA adapter: it holds '{}'", tensor.name));
    ++halves[tensor.name.substr(0, tensor.name.size() - kA.size())];
    factors.push_back(tensor);
    factors.back().name = peft_name(tensor.name);
  }
  if (factors.empty()) refuse("is no LoRA adapter: it holds no factors");
  for (const auto& [path, count] : halves)
    if (count != 2) refuse(fmt::format("has only one of lora_A and lora_B of {}", path));
  if (as_read) {
    write_peft_directory(directory, meta.at("peft"), patterns_as_read(meta), factors, base_model);
  } else {
    write_peft_directory(directory, lora_peft_config(config), {}, factors, base_model);
  }
}

core::ArtefactPtr import_adapter(const std::filesystem::path& directory) {
  const PeftDirectory read = read_peft_directory(directory);
  const AdapterConfig& config = read.config;
  const core::Safetensors& file = read.file;
  if (config.type != "lora")
    throw core::UserError(fmt::format("algorithms/adapters: {} is of type {}", file.origin(), config.type),
                          "only plain LoRA and rsLoRA become artefacts of pairs A and B; use the directory as it is");
  std::vector<std::string> problems;
  const auto pairs = pairs_of(file, problems);
  const std::vector<models::Slot> slots = slots_of(pairs, problems);
  if (problems.empty()) {
    std::map<std::string, int64_t> selected;
    for (const Target& target : targets_of(config, slots, Matching::kAnyName)) selected[target.slot.path] = target.rank;
    for (const auto& [path, pair] : pairs) {
      const auto target = selected.find(path);
      if (target == selected.end()) {
        problems.push_back(fmt::format("{} has factors, but target_modules does not select it", path));
      } else if (target->second != pair.a->shape[0]) {
        problems.push_back(
            fmt::format("{}: rank {}, the configuration says {}", path, pair.a->shape[0], target->second));
      }
    }
  }
  if (!problems.empty()) {
    throw core::UserError(
        fmt::format("algorithms/adapters: {} does not fit its configuration:\n  {}", file.origin(),
                    fmt::join(problems, "\n  ")),
        "only plain LoRA and rsLoRA on linear modules can be read, with the adapter_config.json they were saved with");
  }
  std::vector<core::TensorView> factors = file.tensors();
  for (core::TensorView& factor : factors) factor.name.erase(0, kPrefix.size());
  return core::Artefact::create("adapter",
                                {{"lora", adapter_schema().to_json(config)}, {"peft", core::Json(read.json)}}, factors);
}

}  // namespace moraine::algorithms::adapters
