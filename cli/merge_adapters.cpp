// Adapters of runs and files become one adapter, or one model, without training.
#include "cli/merge_adapters.h"

#include <algorithm>
#include <cmath>

#include "algorithms/adapters/adapter.h"
#include "algorithms/adapters/peft_files.h"
#include "algorithms/language_model.h"
#include "algorithms/mergers/merge_adapters.h"
#include "algorithms/objectives/head.h"
#include "cli/find_artefact.h"
#include "cli/output.h"
#include "cli/run_summary.h"
#include "core/error.h"
#include "core/file.h"
#include "core/hash.h"
#include "core/log.h"
#include "models/checkpoint.h"
#include "models/open_backbone.h"

namespace moraine::cli {
namespace {

namespace fs = std::filesystem;
namespace adapters = algorithms::adapters;
namespace mergers = algorithms::mergers;

/// One adapter: a PEFT directory or an artefact's file, or a result of a run.
struct AdapterEntry {
  std::string path, run, adapter;
  double weight = 1;

  std::string name() const { return path.empty() ? fmt::format("{}: {}", run, adapter) : path; }
};

struct AdaptersConfig {
  std::string base;
  std::vector<AdapterEntry> adapters;
  mergers::MergeConfig how;
  std::string heads = "refuse";
};

std::optional<std::string> entry_problem(const AdapterEntry& entry) {
  if (entry.path.empty() == entry.run.empty() || entry.run.empty() != entry.adapter.empty())
    return "give either path, or run and adapter";
  if (entry.weight == 0) return "weight: 0 contributes nothing: leave the adapter out";
  return std::nullopt;
}

const core::Schema<AdaptersConfig>& adapters_schema() {
  using Entry = AdapterEntry;
  using C = AdaptersConfig;
  static const auto entry = core::Schema<Entry>()
                                .field("path", &Entry::path)
                                .path()
                                .doc("PEFT directory, or an adapter's artefact, from `moraine cp`")
                                .field("run", &Entry::run)
                                .path()
                                .doc("Instead of path: a run directory")
                                .field("adapter", &Entry::adapter)
                                .doc(
                                    "One of its results, <adapter>/<task>/seed<seed>, a unit's label or an "
                                    "artefact's id")
                                .field("weight", &Entry::weight)
                                .doc("How many times its change counts: 1 for all adds them up, 1/n averages")
                                .check(entry_problem);
  static const auto schema =
      core::Schema<C>()
          .field("base", &C::base)
          .path()
          .doc(
              "Model that the adapters were trained on, a directory; empty = the first adapter's, as far as it "
              "names one")
          .list("adapters", &C::adapters, entry)
          .required()
          .doc("What to merge; their order does not matter")
          .object("how", &C::how, mergers::merge_schema())
          .required()
          .doc("The rule")
          .field("heads", &C::heads)
          .choices({"leave_out", "refuse"})
          .doc("Classifiers that were trained beside adapters: no rule joins them; leave_out merges without them")
          .check([](const C& c) -> std::optional<std::string> {
            if (c.adapters.empty()) return "adapters must not be empty";
            return std::nullopt;
          });
  return schema;
}

/// What an entry names, before the base model is known.
struct Source {
  const AdapterEntry* entry = nullptr;
  core::ArtefactPtr artefact;                             // null: a PEFT directory
  std::string base;                                       // the model it says it was trained on; "" = it does not say
  std::string identity = {};                              // of its content
  int64_t image_size = 0;                                 // the run's size of images; 0 = the model's own
  std::optional<adapters::PeftDirectory> directory = {};  // once the base model is known
};

std::string model_of_run(const coordinator::RunRecord& run) {
  const fs::path own = run.layout.root / "public_model";
  return fs::exists(own) ? own.string() : run.recipe.value("/model/path"_json_pointer, std::string());
}

Source source_of_run(const AdapterEntry& entry) {
  const auto run = coordinator::read_run(entry.run);
  // "small/german/seed1" is what the unit "train/small/german/seed1" trained; a word without '/' is an artefact's id.
  const bool is_unit = std::ranges::any_of(run.units, [&](const auto& unit) { return unit.label == entry.adapter; });
  const bool is_result = !is_unit && entry.adapter.find('/') != std::string::npos;
  const auto artefact = run.state->artefact(find_artefact(run, (is_result ? "train/" : "") + entry.adapter));
  return {&entry, artefact, model_of_run(run), artefact->id(),
          run.recipe.value("/model/image_size"_json_pointer, int64_t{0})};
}

Source source_of(const AdapterEntry& entry) {
  if (!entry.run.empty()) return source_of_run(entry);
  if (fs::is_regular_file(entry.path)) {
    const auto artefact = core::Artefact::parse(core::Bytes::map_file(entry.path), "", entry.path);
    return {&entry, artefact, "", artefact->id()};
  }
  const fs::path config = fs::path(entry.path) / "adapter_config.json";
  if (!fs::exists(config))
    throw core::UserError(fmt::format("cli: no adapter at {}", entry.path),
                          "path names a PEFT directory (with adapter_config.json) or a file that `moraine cp` made");
  const core::Json stored = core::read_json(config);
  const core::Json base = stored.value("base_model_name_or_path", core::Json());
  return {&entry, nullptr, base.is_string() ? base.get<std::string>() : ""};
}

[[noreturn]] void refuse_head(const Source& source) {
  throw core::UserError(
      fmt::format("cli: {} has a classifier beside it, which no rule of merging joins", source.entry->name()),
      "heads: leave_out merges the adapters alone; every task keeps the classifier in its own result");
}

void check_artefact(const Source& source, bool may_leave_heads_out) {
  const core::Artefact& artefact = *source.artefact;
  if (artefact.kind() != "adapter" || !artefact.meta().contains("adapter"))
    throw core::UserError(
        fmt::format("cli: {} is no adapter of a finetune run (kind '{}')", source.entry->name(), artefact.kind()),
        "`moraine ls RUN` lists its units; `moraine export RUN DIR --to peft` makes a directory of other runs' "
        "adapters");
  if (algorithms::objectives::Head::read(artefact, at::kCPU).weight.defined() && !may_leave_heads_out)
    refuse_head(source);
}

std::string base_of(const AdaptersConfig& config, const std::vector<Source>& sources) {
  if (!config.base.empty())
    return fs::exists(fs::path(config.base) / "recipe.json") ? model_of_run(coordinator::read_run(config.base))
                                                             : config.base;
  const std::string& first = sources.front().base;
  if (!first.empty() && fs::is_directory(first)) return first;
  throw core::UserError(
      first.empty()
          ? fmt::format("cli: {} does not say on which model it was trained", config.adapters[0].name())
          : fmt::format("cli: {} was trained on {}, which is no directory here", config.adapters[0].name(), first),
      "set base to the model's directory");
}

/// Artefacts name their model by its content, PEFT directories by a name at most: those are held against its shapes.
void check_base(const Source& source, const std::string& base, const std::string& fingerprint) {
  if (!source.artefact) {
    if (!source.base.empty() && source.base != base)
      core::log::warn("adapter names another base model: adapter={} names={} used={}", source.entry->path, source.base,
                      base);
    return;
  }
  const std::string own = source.artefact->meta().value("base", "");
  if (own == fingerprint) return;
  throw core::UserError(fmt::format("cli: {} was trained on another model than {}", source.entry->name(), base),
                        "merge adapters of one model, byte for byte, and name it as base");
}

adapters::Adapter read_adapter(const Source& source, const models::Backbone& base) {
  return source.artefact ? adapters::Adapter::from_artefact(*source.artefact, base, at::kCPU)
                         : adapters::Adapter::load(*source.directory, base, std::nullopt, at::kCPU);
}

void print_merged(const std::vector<Source>& sources, const std::vector<adapters::Adapter>& read,
                  const mergers::MergedSlots& merged, const std::string& type) {
  std::string text;
  for (size_t i = 0; i < sources.size(); ++i)
    text += fmt::format("{:8g} x {} ({})\n", sources[i].entry->weight, sources[i].entry->name(), read[i].config().type);
  int64_t least = std::numeric_limits<int64_t>::max(), most = 0, numbers = 0;
  double norm2 = 0, lost2 = 0;
  for (const auto& [path, change] : merged) {
    if (change.factors) {
      const auto& [b, a] = change.factors->parts.front();
      least = std::min(least, a.size(0)), most = std::max(most, a.size(0));
      numbers += b.numel() + a.numel();
    } else {
      numbers += change.dense.numel();
    }
    norm2 += change.norm2, lost2 += change.lost2;
  }
  text += fmt::format("{}: {} modules, {}, {} numbers\n", type, merged.size(),
                      most == 0       ? "dense"
                      : least == most ? fmt::format("rank {}", most)
                                      : fmt::format("ranks {} to {}", least, most),
                      numbers);
  if (norm2 > 0)
    text += fmt::format("the rank keeps {:.2f} % of the squared norm of the change\n", 100 * (1 - lost2 / norm2));
  print(text);
}

}  // namespace

void merge_adapters(const core::ConfigNode& root, core::Problems& problems, const std::string& file,
                    const fs::path& out, const std::string& format) {
  AdaptersConfig config;
  adapters_schema().parse(root, "", config, problems);
  problems.throw_if_any(file);
  std::vector<Source> sources;
  for (const AdapterEntry& entry : config.adapters) {
    sources.push_back(source_of(entry));
    if (sources.back().artefact) check_artefact(sources.back(), config.heads == "leave_out");
  }
  const std::string base_path = base_of(config, sources);
  std::optional<int64_t> image_size;  // runs at different sizes have different models: check_base()
  for (const Source& source : sources)
    if (source.image_size > 0) image_size = source.image_size;
  const models::ModelFacts facts = models::model_facts(base_path, image_size);
  const bool hashed = std::ranges::any_of(sources, [](const Source& source) { return source.artefact != nullptr; });
  const std::string fingerprint = hashed ? algorithms::model_identity(base_path, facts.config) : "";
  for (const Source& source : sources) check_base(source, base_path, fingerprint);

  for (Source& source : sources) {
    if (source.artefact) continue;
    source.directory = adapters::read_peft_directory(source.entry->path, &facts.classifier);
    source.identity = core::sha256(source.directory->file.bytes().span());
    if (!source.directory->classifier.empty() && config.heads != "leave_out") refuse_head(source);
  }
  // In an order that follows from their content, so that sums do not depend on the list's.
  std::ranges::sort(sources, {}, [](const Source& source) { return std::pair(source.identity, source.entry->weight); });
  const auto base = models::open_backbone(base_path, std::nullopt, image_size);
  std::vector<adapters::Adapter> read;
  for (const Source& source : sources) read.push_back(read_adapter(source, *base));
  std::vector<mergers::Participant> participants;
  for (size_t i = 0; i < sources.size(); ++i)
    participants.push_back({sources[i].entry->name(), sources[i].identity, sources[i].entry->weight, &read[i]});
  const mergers::MergedSlots merged = mergers::merge_adapters(participants, *base, config.how);
  if (format == "peft") {
    mergers::write_peft(merged, *base, out, base_path);
  } else {
    const auto changed = base->changed_by(mergers::changes_of(merged));
    algorithms::write_model_directory(out, facts.config, {changed->weights().begin(), changed->weights().end()});
    models::copy_companions(base_path, out);
  }
  print_merged(sources, read, merged, config.how.type);
  print(fmt::format("{}: {}\n", format == "peft" ? "adapter" : "model", out.string()));
}

std::string merge_adapters_keys() { return adapters_schema().markdown(); }

}  // namespace moraine::cli
