#include "tests/fuzz/world.h"

#include <fmt/format.h>

#include "core/file.h"
#include "core/json.h"
#include "core/safetensors.h"
#include "tests/fuzz/command.h"
#include "tests/sweeps/prepared_files.h"

namespace moraine::fuzz {
namespace {

namespace fs = std::filesystem;

constexpr const char* kFederated = R"(
name: federated
method: fedit
model: {path: base}
domains:
  - {name: left, path: text/left.h5}
  - {name: right, path: text/right.h5}
seq_len: 32
clients: {count: 3, partition: dirichlet, alpha: 2.0, per_round: 2}
rounds: 2
lora: {rank: 2, alpha: 4, target_modules: [q_proj, down_proj]}
train: {steps: 2, batch_size: 2}
evaluation: {sequences: 2, batch_size: 2}
workers: {local: 1}
)";

constexpr const char* kMerge = R"(
base: base
top_k: 2
experts:
  - {artefact: expert.safetensors}
)";

constexpr const char* kMergeAdapters = R"(
base: base
adapters:
  - {path: lora, weight: 0.5}
  - {path: lora}
how: {type: ties, density: 0.5}
)";

void make(const std::vector<std::string>& arguments) {
  const Outcome done = moraine(arguments);
  MORAINE_CHECK(done.exit_code == 0, "moraine {}: {}", arguments.front(), done.errors);
}

// The dense model again, each tensor in a shard of its own half.
void write_shards(const fs::path& from, const fs::path& to) {
  const auto file = core::Safetensors::open(from / "model.safetensors");
  core::Json map = core::Json::object();
  std::vector<core::TensorView> parts[2];
  for (size_t i = 0; i < file.tensors().size(); ++i) {
    parts[i % 2].push_back(file.tensors()[i]);
    map[file.tensors()[i].name] = fmt::format("model-{}.safetensors", i % 2);
  }
  fs::create_directories(to);
  fs::copy_file(from / "config.json", to / "config.json");
  for (size_t i = 0; i < 2; ++i)
    core::write_atomically(to / fmt::format("model-{}.safetensors", i), core::serialize_safetensors(parts[i], {}));
  core::write_atomically(to / "model.safetensors.index.json", core::Json{{"weight_map", map}}.dump(1));
}

// The dense model again beside a tokenizer of its 264 ids: a golden one without the later merges.
void write_tokenizer(const fs::path& model) {
  core::Json file = core::read_json(fs::path(MORAINE_SOURCE_DIR) / "tests/data/golden/smollm2.json");
  core::Json& vocabulary = file["model"]["vocab"];
  for (auto token = vocabulary.begin(); token != vocabulary.end();)
    token = token->get<int64_t>() < 264 ? std::next(token) : vocabulary.erase(token);
  core::Json merges = core::Json::array();
  for (const core::Json& merge : file["model"]["merges"])
    if (vocabulary.contains(merge.at(0).get<std::string>() + merge.at(1).get<std::string>())) merges.push_back(merge);
  file["model"]["merges"] = merges;
  core::write_atomically(model / "tokenizer.json", file.dump());
}

}  // namespace

const World& World::get() {
  static const World world;
  return world;
}

World::World() {
  make_prepared_files(path());
  const auto run = [&](const std::string& recipe, const std::string& name, std::vector<std::string> overrides) {
    std::vector<std::string> line = {"run", (*this / recipe).string(), "--run-dir",
                                     (*this / ("runs/" + name)).string()};
    line.insert(line.end(), overrides.begin(), overrides.end());
    make(line);
  };
  run("text/recipe.yaml", "flexmore", {"train.steps=3", "workers.local=1"});
  fs::copy(*this / "runs/flexmore/public_model", *this / "base", fs::copy_options::recursive);
  fs::copy(*this / "base", *this / "speaking", fs::copy_options::recursive);
  write_tokenizer(*this / "speaking");
  fs::copy(*this / "runs/flexmore/mixture", *this / "mixture", fs::copy_options::recursive);
  core::write_atomically(*this / "federated.yaml", kFederated);
  core::write_atomically(*this / "merge.yaml", kMerge);
  core::write_atomically(*this / "merge_adapters.yaml", kMergeAdapters);
  run("federated.yaml", "federated", {});
  run("images/recipe.yaml", "continual", {"train.steps=2", "workers.local=1", "orders=[-1]"});
  make({"cp", (*this / "runs/flexmore").string(), "extract/left", (*this / "expert.safetensors").string()});
  make({"cp", (*this / "runs/federated").string(), "aggregate/2", (*this / "adapter.safetensors").string()});
  make({"export", (*this / "runs/federated").string(), (*this / "lora").string(), "--to", "peft"});
  write_shards(*this / "base", *this / "sharded");
}

Scratch::Scratch(const std::vector<std::string>& names) : names_(names) {
  for (const auto& name : names) {
    fs::create_directories((directory_ / name).parent_path());
    fs::copy(World::get() / name, directory_ / name, fs::copy_options::recursive);
  }
}

fs::path Scratch::out() {
  fs::remove_all(directory_ / "out");
  return directory_ / "out";
}

void Scratch::spoil(const std::string& name, Random& random) const {
  const fs::path file = directory_ / name;
  const std::string kind = file.extension().string();
  if (kind == ".h5") return mutate_hdf5(file, random);
  const std::string text = core::read_text(file);
  core::write_atomically(file, kind == ".json" || kind == ".jsonl" ? mutate_json_text(text, random)
                               : kind == ".yaml"                   ? mutate_yaml(text, random)
                               : kind == ".safetensors"            ? mutate_safetensors(text, random)
                                                                   : mutate_bytes(text, random));
}

void Scratch::mend(const std::string& name) const {
  fs::copy_file(World::get() / name, directory_ / name, fs::copy_options::overwrite_existing);
}

}  // namespace moraine::fuzz
