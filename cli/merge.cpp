// Experts of any runs and files behind one router, or adapters in one, without training.
#include <set>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>
#include <fmt/ranges.h>
#include <CLI/CLI.hpp>

#include "algorithms/flexmore/mixture_files.h"
#include "cli/command.h"
#include "cli/find_artefact.h"
#include "cli/merge_adapters.h"
#include "cli/output.h"
#include "cli/run_summary.h"
#include "core/config.h"
#include "core/error.h"
#include "core/registry.h"
#include "models/tensor_io.h"
#include "models/weights.h"

namespace moraine::cli {
namespace {

namespace fs = std::filesystem;
namespace flexmore = algorithms::flexmore;

/// One expert of the mixture: of a run by its name (or a unit's label, or an artefact's id), or a file.
struct MergeExpert {
  std::string run, expert, artefact;
  int64_t rank = 0;
};

struct MergeConfig {
  std::string base;
  std::vector<MergeExpert> experts;
  std::vector<std::string> leave_out;
  int64_t top_k = 2;
  bool norm_topk_prob = false;
};

const core::Schema<MergeConfig>& merge_schema() {
  static const auto schema = [] {
    static core::Schema<MergeExpert> expert;
    expert.field("run", &MergeExpert::run)
        .path()
        .doc("Run directory")
        .field("expert", &MergeExpert::expert)
        .doc("Name of one of its experts, a unit's label, or an artefact's id")
        .field("artefact", &MergeExpert::artefact)
        .path()
        .doc("Instead of run and expert: an expert's file, from `moraine cp` or `moraine import`")
        .field("rank", &MergeExpert::rank)
        .min(0)
        .doc("Cut a low-rank expert to this rank; 0 = as it is, full-size where a run has both")
        .check([](const MergeExpert& e) -> std::optional<std::string> {
          if (e.artefact.empty() == e.run.empty() || e.run.empty() != e.expert.empty())
            return "give either run and expert, or artefact";
          return std::nullopt;
        });
    core::Schema<MergeConfig> s;
    s.field("base", &MergeConfig::base)
        .path()
        .doc("Public model: a Hugging Face directory, or a run; empty = that of the first expert's run")
        .list("experts", &MergeConfig::experts, expert)
        .required()
        .doc("What to merge")
        .field("leave_out", &MergeConfig::leave_out)
        .doc("Names of experts left out again")
        .field("top_k", &MergeConfig::top_k)
        .min(1)
        .doc("Experts per token, the public one included")
        .field("norm_topk_prob", &MergeConfig::norm_topk_prob)
        .doc("Divide the selected gates by their sum");
    s.check([](const MergeConfig& c) -> std::optional<std::string> {
      if (c.experts.empty()) return "experts must not be empty";
      if (c.base.empty() && c.experts.front().run.empty()) return "base must be given when the first expert is a file";
      return std::nullopt;
    });
    return s;
  }();
  return schema;
}

// Of the run's experts of that name: a full-size one for rank 0 if there is one, else the low-rank one of the largest
// rank.
std::string expert_of_run(const coordinator::RunRecord& run, const MergeExpert& wanted) {
  std::string best;
  int64_t best_rank = -1;
  std::set<std::string> names;
  for (const auto& unit : run.units) {
    if (unit.kind != "train_expert" && unit.kind != "extract") continue;
    const auto artefact = run.state->artefact(unit.artefact);
    if (artefact->kind() != "expert") continue;
    const auto name = artefact->meta().at("name").get<std::string>();
    names.insert(name);
    if (name != wanted.expert) continue;
    const auto rank = artefact->meta().at("rank").get<int64_t>();
    const int64_t value = rank == 0 ? (wanted.rank == 0 ? std::numeric_limits<int64_t>::max() : 0) : rank;
    if (value >= best_rank) {
      best_rank = value;
      best = unit.artefact;
    }
  }
  if (!best.empty()) return best;
  if (wanted.expert.find('/') != std::string::npos || wanted.expert.size() == 64)
    return find_artefact(run, wanted.expert);
  const std::vector<std::string> known(names.begin(), names.end());
  throw core::UserError(fmt::format("cli: {} has no expert '{}'", run.layout.root.string(), wanted.expert),
                        core::name_hint(wanted.expert, known));
}

core::ArtefactPtr read_artefact(const fs::path& path) {
  return core::Artefact::parse(core::Bytes::map_file(path), "", path.string());
}

// Row 0 of the routers of mixtures that lie beside the experts: the public expert's own.
struct PublicRows {
  std::vector<std::vector<at::Tensor>> candidates;

  void add(const core::ArtefactPtr& artefact) {
    if (artefact->kind() == "mixture") candidates.push_back(flexmore::read_mixture(*artefact).public_rows);
  }
  /// Those that the expert was trained against, by their digest; rows of zeros need not be found anywhere.
  std::vector<at::Tensor> matching(const core::Artefact& expert, const models::DecoderConfig& base) {
    candidates.emplace_back();
    for (int64_t l = 0; l < base.num_layers; ++l)
      candidates.back().push_back(at::zeros({base.hidden_size}, at::kFloat));
    const core::Json& digests = expert.meta().at("base_tensors");
    for (const auto& rows : candidates) {
      const core::Json own = flexmore::fingerprint_of_base({}, rows);
      if (std::all_of(own.items().begin(), own.items().end(),
                      [&](const auto& entry) { return digests.value(entry.key(), "") == entry.value(); }))
        return rows;
    }
    throw core::UserError(
        "cli: the public router rows that these experts were trained against were not found",
        "name a run that has merged a mixture, or import the mixture they came from: their rows are compared by hash");
  }
};

// The public model as stored, from a directory or a run.
flexmore::MixtureModel public_model(const fs::path& source) {
  fs::path directory = source;
  if (fs::exists(source / "recipe.json")) {
    const auto run = coordinator::read_run(source);
    for (const auto& unit : run.units) {
      const auto artefact = run.state->artefact(unit.artefact);
      if (artefact->kind() != "base") continue;
      const auto config = models::DecoderConfig::from_json(artefact->meta().at("config"), artefact->file().origin());
      const auto model = models::Decoder::from_tensors(config, artefact->file().tensors(), artefact->file().origin(),
                                                       std::nullopt, artefact);
      return {config, model.weights(), {}, 0, false};
    }
    directory = run.recipe.value("/model/path"_json_pointer, std::string());
    if (directory.empty())
      throw core::UserError(fmt::format("cli: {} has no public model yet", source.string()),
                            "set base to a Hugging Face directory");
  }
  const auto model = models::Decoder::from_directory(directory, std::nullopt);
  return {model.config(), model.weights(), {}, 0, false, directory};
}

// Digests were taken of the tensors as workers saw them, that is in the run's compute type.
core::Json fingerprint_like(const core::Artefact& expert, const flexmore::MixtureModel& model,
                            const std::vector<at::Tensor>& rows) {
  core::Json first;
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    std::map<std::string, at::Tensor> weights;
    for (const auto& [name, weight] : model.base_weights) weights.emplace(name, weight.to(dtype));
    const core::Json fingerprint = flexmore::fingerprint_of_base(weights, rows);
    if (fingerprint == expert.meta().at("base_tensors")) return fingerprint;
    if (first.is_null()) first = fingerprint;
  }
  return first;  // merge() then lists what differs
}

void merge_experts(const core::ConfigNode& root, core::Problems& problems, const std::string& file,
                   const std::string& out) {
  MergeConfig config;
  merge_schema().parse(root, "", config, problems);
  problems.throw_if_any(file);

  std::vector<core::ArtefactPtr> experts;
  std::vector<int64_t> ranks;
  PublicRows rows;
  std::set<fs::path> seen;
  for (const auto& wanted : config.experts) {
    if (wanted.run.empty()) {
      experts.push_back(read_artefact(wanted.artefact));
      const fs::path beside = fs::path(wanted.artefact).parent_path() / "mixture.safetensors";
      if (seen.insert(beside).second && fs::exists(beside)) rows.add(read_artefact(beside));
    } else {
      const auto run = coordinator::read_run(wanted.run);
      experts.push_back(run.state->artefact(expert_of_run(run, wanted)));
      if (seen.insert(wanted.run).second)
        for (const auto& unit : run.units)
          if (unit.kind == "merge") rows.add(run.state->artefact(unit.artefact));
    }
    if (experts.back()->kind() != "expert" || !experts.back()->meta().contains("base_tensors"))
      throw core::UserError(
          fmt::format("cli: {} is no trained expert (kind '{}')", experts.back()->file().origin(),
                      experts.back()->kind()),
          "`moraine ls RUN` lists the units of a run; experts are made by train/NAME and extract/NAME");
    ranks.push_back(wanted.rank);
  }
  flexmore::MixtureModel model = public_model(config.base.empty() ? config.experts.front().run : config.base);
  const auto public_rows = rows.matching(*experts.front(), model.base);
  model.mixture = flexmore::merge(experts, ranks, public_rows, fingerprint_like(*experts.front(), model, public_rows));
  for (const auto& name : config.leave_out)
    if (std::erase_if(model.mixture.experts, [&](const flexmore::Expert& e) { return e.name == name; }) == 0)
      throw core::UserError(fmt::format("cli: leave_out: no expert '{}'", name),
                            "leave_out takes names of experts that are merged");
  const auto available = static_cast<int64_t>(model.mixture.experts.size()) + 1;
  if (config.top_k > available)
    throw core::UserError(
        fmt::format("cli: top_k {} is more than the {} experts, the public one included", config.top_k, available),
        "lower top_k");
  model.top_k = config.top_k;
  model.norm_topk_prob = config.norm_topk_prob;
  flexmore::write_flexmore_directory(model, out);
  for (const auto& expert : model.mixture.experts)
    print(fmt::format("{:24} {}\n", expert.name, expert.rank() ? fmt::format("rank {}", expert.rank()) : "full-size"));
  const auto artefact = flexmore::write_mixture(model.mixture, {{"base", experts.front()->meta().at("base")}});
  print(fmt::format("merged artefact: {}\nmixture: {}\n", artefact->id(), out));
}

struct MergeArguments {
  std::string config, out, format;
  std::vector<std::string> overrides;
};

void merge(const MergeArguments& arguments) {
  const at::NoGradGuard no_grad;
  const fs::path out = arguments.out;
  if (fs::exists(out) && !(fs::is_directory(out) && fs::is_empty(out)))
    throw core::UserError(fmt::format("cli: {} exists and is not empty", out.string()), "name a new directory");
  core::Problems problems;
  const core::ConfigNode root = core::load_config(arguments.config, arguments.overrides, problems);
  if (root.find("adapters") != nullptr)
    return merge_adapters(root, problems, arguments.config, out, arguments.format.empty() ? "peft" : arguments.format);
  if (!arguments.format.empty())
    throw core::UserError(fmt::format("cli: {} lists no adapters: --to has no meaning", arguments.config),
                          "experts become a mixture, which `moraine export` writes in other forms");
  merge_experts(root, problems, arguments.config, arguments.out);
}

}  // namespace

void add_merge(CLI::App& app, int& exit_code) {
  auto* command = app.add_subcommand(
      "merge", "Merges experts of any runs into one mixture, or adapters into one, without training");
  auto a = std::make_shared<MergeArguments>();
  command
      ->add_option("config", a->config,
                   "YAML: experts: [{run, expert, rank} | {artefact, rank}], base, top_k, norm_topk_prob, leave_out; "
                   "or adapters: [{path, weight} | {run, adapter, weight}], how: {type, ...}, base, heads")
      ->required();
  command->add_option("out", a->out, "New directory: a mixture (FlexMoRE keys, as RUN/mixture), or the merged adapter")
      ->required();
  command->add_option("overrides", a->overrides, "key.sub=value ...: change values of the file");
  command->add_option("--to", a->format, "Adapters: peft, a plain LoRA (default) | hf, the merged model")
      ->check(CLI::IsMember({"peft", "hf"}));
  command->footer(
      "Every expert or adapter must have been trained against the same public model, byte for byte. Keys, "
      "experts:\n" +
      merge_schema().markdown() + "\nKeys, adapters (rules: docs/merging.md):\n" + merge_adapters_keys() +
      "\nExamples: moraine merge two_runs.yaml models/both top_k=3\n          moraine merge adapters.yaml "
      "both-lora how.rank=16");
  command->callback([=, &exit_code] {
    merge(*a);
    exit_code = 0;
  });
}

}  // namespace moraine::cli
