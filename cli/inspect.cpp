// What a file or directory holds: shapes, types, counts, ranks, hashes, and the singular values of low-rank pairs.
#include <algorithm>
#include <array>
#include <fstream>
#include <map>
#include <optional>

#include <fmt/ranges.h>
#include <CLI/CLI.hpp>

#include "algorithms/adapters/factor_spectrum.h"
#include "cli/command.h"
#include "cli/find_artefact.h"
#include "cli/output.h"
#include "coordinator/report/table.h"
#include "coordinator/run_record.h"
#include "core/checksums.h"
#include "core/error.h"
#include "core/hash.h"
#include "core/hdf5.h"
#include "core/safetensors.h"
#include "models/tensor_io.h"

namespace moraine::cli {
namespace {

namespace fs = std::filesystem;

struct InspectArguments {
  std::string path, what, format = "text";
  bool spectra = false, hash = true;
};

// "x.lora_A.weight" and "x.lora_B.weight", or FlexMoRE's "x_a.weight" and "x_b.weight".
std::optional<std::string> partner_of(const std::string& a) {
  static constexpr std::array<std::array<const char*, 2>, 2> kEndings = {
      {{".lora_A.weight", ".lora_B.weight"}, {"_a.weight", "_b.weight"}}};
  for (const auto& [first, second] : kEndings)
    if (a.ends_with(first)) return a.substr(0, a.size() - std::string_view(first).size()) + second;
  return std::nullopt;
}

core::Json low_rank_pairs(const std::vector<core::TensorView>& tensors, bool spectra) {
  std::map<std::string, const core::TensorView*> by_name;
  for (const auto& tensor : tensors) by_name[tensor.name] = &tensor;
  core::Json pairs = core::Json::array();
  for (const auto& a : tensors) {
    const auto name = partner_of(a.name);
    const auto b = name ? by_name.find(*name) : by_name.end();
    if (b == by_name.end() || a.shape.size() != 2 || b->second->shape.size() != 2 || a.shape[0] != b->second->shape[1])
      continue;
    core::Json pair = {{"a", a.name}, {"b", *name}, {"rank", a.shape[0]}, {"shape", {b->second->shape[0], a.shape[1]}}};
    if (spectra) {
      const at::Tensor values =
          algorithms::adapters::singular_values_of_product(models::copy_of(a), models::copy_of(*b->second));
      pair["spectrum"] =
          std::vector<double>(values.const_data_ptr<double>(), values.const_data_ptr<double>() + values.numel());
    }
    pairs.push_back(std::move(pair));
  }
  return pairs;
}

void add_tensors(core::Json& facts, const std::vector<core::TensorView>& tensors, bool spectra) {
  core::Json list = core::Json::array();
  std::map<std::string, int64_t> by_type;
  int64_t parameters = 0;
  for (const auto& tensor : tensors) {
    list.push_back({{"name", tensor.name},
                    {"dtype", core::safetensors_name(tensor.dtype)},
                    {"shape", tensor.shape},
                    {"parameters", tensor.numel()}});
    by_type[std::string(core::safetensors_name(tensor.dtype))] += tensor.numel();
    parameters += tensor.numel();
  }
  facts["parameters"] = parameters;
  facts["parameters_by_dtype"] = by_type;
  facts["tensors"] = std::move(list);
  facts["low_rank"] = low_rank_pairs(tensors, spectra);
}

// The SHA-256 that a file's place promises: of an artefact its name, ab/cd<rest>.safetensors, else what the SHA256SUMS
// beside it says.
std::optional<std::string> promised_hash(const fs::path& path) {
  const std::string name = fs::absolute(path).parent_path().filename().string() + path.stem().string();
  const auto hexadecimal = [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); };
  if (name.size() == 64 && std::all_of(name.begin(), name.end(), hexadecimal)) return name;
  const core::Checksums sums = core::read_checksums(fs::absolute(path).parent_path());
  const auto listed = sums.find(path.filename().string());
  return listed == sums.end() ? std::nullopt : std::optional(listed->second);
}

core::Json inspect_safetensors(const fs::path& path, const InspectArguments& how) {
  const auto file = core::Safetensors::open(path);
  core::Json facts = {{"type", "safetensors"}, {"bytes", file.bytes().size()}};
  if (how.hash) {
    facts["sha256"] = core::sha256(file.bytes().span());
    if (const auto promised = promised_hash(path); promised && *promised != facts["sha256"])
      facts["damaged"] = fmt::format("its SHA-256 should be {}", *promised);
  }
  core::Json metadata = core::Json::object();
  for (const auto& [key, value] : file.metadata()) {
    if (key == "moraine") {
      facts["type"] = "artefact";
      metadata[key] = core::parse_json(value, path.string());
    } else {
      metadata[key] = value;
    }
  }
  facts["metadata"] = metadata;
  add_tensors(facts, file.tensors(), how.spectra);
  return facts;
}

core::Json inspect_hdf5(const fs::path& path, const InspectArguments& how) {
  const core::Hdf5File file(path, core::Hdf5File::Mode::kRead);
  core::Json facts = {{"type", "hdf5"},
                      {"bytes", fs::file_size(path)},
                      {"metadata", file.attributes()},
                      {"tensors", core::Json::array()},
                      {"low_rank", core::Json::array()}};
  if (how.hash) facts["sha256"] = core::sha256(core::Bytes::map_file(path).span());
  int64_t total = 0;
  for (const auto& dataset : file.datasets()) {
    int64_t values = 1;
    for (const int64_t side : dataset.shape) values *= side;
    total += values;
    facts["tensors"].push_back(
        {{"name", dataset.name}, {"dtype", dataset.type}, {"shape", dataset.shape}, {"parameters", values}});
  }
  facts["parameters"] = total;
  return facts;
}

// A Hugging Face or PEFT directory: its configuration and all tensors, whatever the shards.
core::Json inspect_model(const fs::path& directory, const InspectArguments& how) {
  const bool peft = fs::exists(directory / "adapter_config.json");
  core::Json facts = {{"type", peft ? "peft" : "hugging face"},
                      {"metadata", core::read_json(directory / (peft ? "adapter_config.json" : "config.json"))}};
  core::Json files = core::Json::object();
  uintmax_t bytes = 0;
  for (const auto& entry : fs::directory_iterator(directory)) {
    if (entry.path().extension() != ".safetensors") continue;
    bytes += entry.file_size();
    files[entry.path().filename().string()] =
        how.hash ? core::sha256(core::Bytes::map_file(entry.path()).span()) : std::string();
  }
  facts["bytes"] = bytes;
  if (how.hash) {
    facts["files"] = files;
    for (const auto& [name, sum] : core::read_checksums(directory))
      if (files.value(name, sum) != sum) facts["damaged"][name] = fmt::format("its SHA-256 should be {}", sum);
  }
  if (peft) {
    add_tensors(facts, core::Safetensors::open(directory / "adapter_model.safetensors").tensors(), how.spectra);
  } else {
    add_tensors(facts, core::ShardedSafetensors::open_unchecked(directory).tensors(), how.spectra);
  }
  return facts;
}

// A run: what its artefacts are, by kind. Which unit made which is `moraine ls RUN`.
core::Json inspect_run(const coordinator::RunRecord& run) {
  struct Kind {
    int64_t count = 0, tensors = 0, parameters = 0, bytes = 0;
  };
  std::map<std::string, Kind> kinds;
  std::map<std::string, bool> seen;
  for (const auto& unit : run.units) {
    if (!seen.emplace(unit.artefact, true).second) continue;
    const auto artefact = run.state->artefact(unit.artefact);
    Kind& kind = kinds[artefact->kind()];
    ++kind.count;
    kind.bytes += static_cast<int64_t>(artefact->bytes().size());
    for (const auto& tensor : artefact->file().tensors()) {
      ++kind.tensors;
      kind.parameters += tensor.numel();
    }
  }
  core::Json rows = core::Json::array();
  for (const auto& [name, kind] : kinds)
    rows.push_back({{"kind", name},
                    {"artefacts", kind.count},
                    {"tensors", kind.tensors},
                    {"parameters", kind.parameters},
                    {"bytes", kind.bytes}});
  return {{"type", "run"},
          {"metadata", {{"name", run.recipe.at("name")}, {"method", run.recipe.at("method")}}},
          {"state", run.finished ? "finished" : "unfinished"},
          {"units", run.units.size()},
          {"starts", run.epochs.size()},
          {"failures", run.failures.size()},
          {"artefacts", rows}};
}

bool is_hdf5(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::array<char, 8> start{};
  file.read(start.data(), start.size());
  return std::string_view(start.data(), start.size()) == "\x89HDF\r\n\x1a\n";
}

core::Json inspect(const InspectArguments& arguments) {
  const fs::path path = arguments.path;
  core::Json facts;
  if (!arguments.what.empty()) {
    const auto run = coordinator::read_run(path);
    const fs::path file = run.state->path_of(find_artefact(run, arguments.what));
    facts = inspect_safetensors(file, arguments);
    facts["path"] = file.string();
    return facts;
  }
  if (fs::is_directory(path)) {
    if (fs::exists(path / "recipe.json")) {
      facts = inspect_run(coordinator::read_run(path));
    } else if (fs::exists(path / "config.json") || fs::exists(path / "adapter_config.json")) {
      facts = inspect_model(path, arguments);
    } else {
      throw core::UserError(
          fmt::format("cli: {} is neither a run nor a model directory", path.string()),
          "a run has recipe.json, a Hugging Face model config.json, a PEFT adapter adapter_config.json");
    }
  } else {
    facts = fs::is_regular_file(path) && is_hdf5(path) ? inspect_hdf5(path, arguments)
                                                       : inspect_safetensors(path, arguments);
  }
  facts["path"] = path.string();
  return facts;
}

void flatten(const core::Json& value, const std::string& key, core::Json& rows) {
  constexpr size_t kMostKeys = 16;  // of an object inside another, such as the digests of a base's tensors
  if (value.is_object() && !key.empty() && key.find('.') != std::string::npos && value.size() > kMostKeys) {
    rows.push_back({{"key", key}, {"value", fmt::format("({} entries)", value.size())}});
    return;
  }
  if (value.is_object() && !value.empty()) {
    for (const auto& [name, part] : value.items()) flatten(part, key.empty() ? name : key + "." + name, rows);
    return;
  }
  std::string text = value.is_string() ? value.get<std::string>() : value.dump();
  constexpr size_t kLongest = 100;
  if (text.size() > kLongest) text = text.substr(0, kLongest) + fmt::format("... ({} characters)", text.size());
  rows.push_back({{"key", key}, {"value", text}});
}

void print_tables(const core::Json& facts) {
  const report::TableStyle style = table_style(160);
  core::Json rows = core::Json::array();
  for (const auto& [key, value] : facts.items()) {
    if (key == "tensors" || key == "low_rank" || key == "artefacts" || key == "metadata" || key == "path") continue;
    flatten(value, key, rows);
  }
  flatten(facts.at("metadata"), "", rows);
  std::string text =
      report::render_table(report::plain_table(facts.at("path").get<std::string>(), {"key", "value"}, rows), style);
  if (facts.contains("artefacts"))
    text +=
        report::render_table(report::plain_table("Artefacts", {"kind", "artefacts", "tensors", "parameters", "bytes"},
                                                 facts.at("artefacts")),
                             style);
  if (!facts.value("tensors", core::Json::array()).empty()) {
    rows = core::Json::array();
    for (const auto& tensor : facts.at("tensors"))
      rows.push_back({{"name", tensor.at("name")},
                      {"dtype", tensor.at("dtype")},
                      {"shape", tensor.at("shape").dump()},
                      {"parameters", tensor.at("parameters")}});
    text += report::render_table(report::plain_table("Tensors", {"name", "dtype", "shape", "parameters"}, rows), style);
  }
  if (!facts.value("low_rank", core::Json::array()).empty()) {
    rows = core::Json::array();
    for (const auto& pair : facts.at("low_rank")) {
      core::Json row = {{"a", pair.at("a")}, {"rank", pair.at("rank")}, {"shape", pair.at("shape").dump()}};
      if (pair.contains("spectrum")) {
        std::vector<std::string> values;
        for (const double value : pair.at("spectrum")) values.push_back(fmt::format("{:.4g}", value));
        row["singular values of B A"] = fmt::format("{}", fmt::join(values, " "));
      }
      rows.push_back(std::move(row));
    }
    std::vector<std::string> columns = {"a", "rank", "shape"};
    if (rows.front().contains("singular values of B A")) columns.push_back("singular values of B A");
    text += report::render_table(report::plain_table("Low-rank pairs", columns, rows), style);
  }
  print(text);
}

}  // namespace

void add_inspect(CLI::App& app, int& exit_code) {
  auto* command =
      app.add_subcommand("inspect", "What a file or directory holds: shapes, types, counts, ranks, hashes, metadata");
  auto arguments = std::make_shared<InspectArguments>();
  command
      ->add_option("path", arguments->path,
                   "safetensors file, artefact, HDF5 file, Hugging Face or PEFT directory, run")
      ->required();
  command->add_option("what", arguments->what, "Of a run: unit label, artefact id, or the beginning of one");
  command->add_flag("--spectra", arguments->spectra, "Singular values of every low-rank pair");
  command->add_flag("!--no-hash", arguments->hash,
                    "Do not read all bytes for SHA-256, nor compare it with the file's name or SHA256SUMS");
  add_format_option(*command, arguments->format);
  command->footer(
      "Examples: moraine inspect runs/quickstart/mixture\n          moraine inspect runs/quickstart extract/german "
      "--spectra\n"
      "          moraine inspect data/domains/german.h5 --format json");
  command->callback([=, &exit_code] {
    const core::Json facts = inspect(*arguments);
    if (arguments->format == "json") {
      print_json(facts);
    } else {
      print_tables(facts);
    }
    exit_code = facts.contains("damaged") ? core::kExitUser : core::kExitOk;
  });
}

}  // namespace moraine::cli
