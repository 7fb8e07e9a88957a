// Every key of every method's recipe, changed alone: a key's documentation says what it can change (a result, only what
// is measured, or nothing), and the ids of the units of the two plans say whether that is true.
#include <algorithm>
#include <map>
#include <set>

#include <gtest/gtest.h>

#include "algorithms/language_model.h"
#include "algorithms/register.h"
#include "core/error.h"
#include "core/file.h"
#include "models/decoder.h"
#include "models/vit.h"
#include "tests/sweeps/prepared_files.h"
#include "tests/temporary_directory.h"

namespace moraine::algorithms {
namespace {

namespace fs = std::filesystem;
using core::Json;
using Overrides = std::vector<std::string>;

// Results that are made up as a plan asks for them: enough for every plan to go on to its end.
class MadeUpResults final : public RunState {
 public:
  std::optional<std::string> result(const std::string& unit) const override {
    const auto it = results_.find(unit);
    return it == results_.end() ? std::nullopt : std::optional(it->second->id());
  }
  core::ArtefactPtr artefact(const std::string& id) const override { return artefacts_.at(id); }

  void finish(const Unit& unit) {
    // A higher rank scores better, so that a budget for ranks has something to decide.
    const double bits = 3 - 0.1 * unit.spec.value("rank", 0);
    const Json result = {{"nats", bits * 1000}, {"tokens", 1000}, {"bytes", 1000}, {"correct", 10}};
    const auto artefact = core::Artefact::create(
        unit.kind, {{"of", unit.id()}, {"result", result}, {"rank", unit.spec.value("rank", 0)}, {"name", "made-up"}},
        {});
    results_[unit.id()] = artefact;
    artefacts_[artefact->id()] = artefact;
  }

 private:
  std::map<std::string, core::ArtefactPtr> results_, artefacts_;
};

// The ids of a whole plan.
struct Ids {
  std::set<std::string> work, measurements;  // what leads to a result; what only measures one
  bool operator==(const Ids&) const = default;
};

Ids plan_to_the_end(const Method& method) {
  MadeUpResults results;
  Plan plan = method.plan(results);
  for (int wave = 0; wave < 100 && !plan.pending.empty(); ++wave, plan = method.plan(results))
    for (const auto& unit : plan.pending) results.finish(unit);
  EXPECT_TRUE(plan.pending.empty());
  Ids ids;
  for (const auto& unit : plan.finished) {
    const bool measures = unit.label.starts_with("test/") || unit.kind == "matrices";
    (measures ? ids.measurements : ids.work).insert(unit.id());
  }
  return ids;
}

// How a key is changed, where its type does not say it all.
struct Change {
  Overrides context = {};   // of both recipes: what must hold for the key to matter
  Overrides change = {};    // empty = another value by the key's type
  Overrides moved = {};     // for paths: the same bytes elsewhere
  bool refused = false;     // the method has no use for it and says so
  bool configured = false;  // it stands in the configuration that is exported beside the artefact
  bool elsewhere = false;   // another recipe of the method is for it
  bool only_drawn = false;  // of keys that are for evaluation only: no unit knows them, tables do
};

// One recipe of a method. Keys of list items are those of the first: "domains.0.name".
struct Sweep {
  std::string method, recipe;
  std::map<std::string, Change> changes;
  std::set<std::string> only;  // not empty: the keys that this recipe is for
};

struct Key {
  std::string path, doc;
  Json schema, fallback;
};

// A list of the alternatives, which may be written as its only item; or else the first one, which is no reference and
// not null.
Json unwrapped(const Json& schema) {
  if (!schema.contains("anyOf")) return schema;
  for (const auto& one : schema.at("anyOf"))
    if (one.value("type", "") == "array") return one;
  return unwrapped(schema.at("anyOf").at(0));
}

void collect(const Json& schema, const std::string& path, std::vector<Key>& out) {
  for (const auto& [name, property] : schema.at("properties").items()) {
    if (path.empty() && name == "defaults") continue;
    const std::string at = path.empty() ? name : path + "." + name;
    const Json value = unwrapped(property);
    const Json item = value.value("type", "") == "array" ? unwrapped(value.at("items")) : Json();
    if (value.contains("properties")) {
      collect(value, at, out);
    } else if (item.is_object() && item.contains("properties")) {
      collect(item, at + ".0", out);
    } else {
      out.push_back({at, property.value("description", ""), value, property.value("default", Json())});
    }
  }
}

std::vector<Key> keys_of(const MethodEntry& method) {
  std::vector<Key> keys;
  collect(method.json_schema(), "", keys);
  return keys;
}

Json value_at(const Json& values, const std::string& path) {
  std::string pointer = "/" + path;
  std::replace(pointer.begin(), pointer.end(), '.', '/');
  return values.value(Json::json_pointer(pointer), Json());
}

// Another value of the type that the schema allows; null when there is none, or none can be known.
Json another(const Json& schema, const Json& value) {
  if (schema.contains("enum")) {
    for (const auto& choice : schema.at("enum"))
      if (choice != value) return choice;
    return nullptr;
  }
  const std::string type = schema.value("type", "");
  if (type == "boolean") return !value.get<bool>();
  if (type == "array") {
    if (value.size() > 1) return Json(value.begin(), value.end() - 1);
    const Json item = another(unwrapped(schema.at("items")), value.empty() ? Json(0) : value.front());
    return item.is_null() ? item : Json::array({item});
  }
  const bool whole = type == "integer";
  if (!whole && type != "number") return nullptr;
  const double number = value.get<double>(), most = schema.value("maximum", 1e18);
  const double least = schema.value("minimum", schema.value("exclusiveMinimum", -1e18));
  for (const double other : {whole ? number + 1 : number / 2, whole ? number - 1 : number + 0.25})
    if (other != number && other <= most && (other > least || (other == least && schema.contains("minimum"))))
      return whole ? Json(static_cast<int64_t>(other)) : Json(other);
  return nullptr;
}

class RecipeKeys : public testing::TestWithParam<std::string> {
 protected:
  static void SetUpTestSuite() {
    files_ = std::make_unique<TemporaryDirectory>();
    make_prepared_files(files_->path());
    for (const uint64_t seed : {1, 2}) write_model(seed);
    write_vit();
    fs::create_directories(*files_ / "copies");
    for (const char* name : {"text", "images", "encoder", "encoded", "examples", "model1"})
      fs::copy(*files_ / name, *files_ / "copies" / name, fs::copy_options::recursive);
  }
  static void TearDownTestSuite() { files_.reset(); }

  static void write_model(uint64_t seed) {
    models::DecoderConfig config;
    config.family = models::DecoderConfig::Family::kOlmo2;
    config.vocab_size = 264, config.hidden_size = 16, config.intermediate_size = 24, config.num_layers = 2;
    config.num_heads = config.num_kv_heads = 2, config.head_dim = 8, config.max_position_embeddings = 64;
    const auto model = models::Decoder::from_config(config, seed, at::kFloat);
    write_model_directory(file(fmt::format("model{}", seed)), config.to_json(),
                          {model.weights().begin(), model.weights().end()});
  }

  static void write_vit() {
    models::VitConfig config;
    config.image_size = 6, config.patch_size = 3, config.num_channels = 1, config.hidden_size = 8;
    config.intermediate_size = 12, config.num_layers = 1, config.num_heads = 2;
    const auto model = models::Vit::from_config(config, 1, at::kFloat);
    write_model_directory(file("vit"), config.to_json(), {model.weights().begin(), model.weights().end()});
  }

  static std::string file(const std::string& name) { return (*files_ / name).string(); }
  // A path key: the same bytes elsewhere, and other bytes.
  static Change path_change(const std::string& key, const std::string& now, const std::string& other,
                            const Overrides& context = {}) {
    return {.context = context, .change = {key + "=" + file(other)}, .moved = {key + "=" + file("copies/" + now)}};
  }

  // A recipe with overrides, as `run` reads it, and its whole plan.
  struct Loaded {
    Json values;
    std::vector<core::ResolvedValue> resolved;
    Ids ids;
  };
  const Loaded& load(const std::string& recipe, const Overrides& overrides);
  void examine(const Sweep& sweep, const Key& key);

  static std::vector<Sweep> sweeps_of(const std::string& method);
  static void change_adapter(const std::string& at, std::map<std::string, Change>& changes);
  static std::vector<Sweep> flexmore();
  static std::vector<Sweep> federated(const std::string& method);
  static std::vector<Sweep> continual();
  static std::vector<Sweep> finetune();

  static std::unique_ptr<TemporaryDirectory> files_;
  std::map<std::pair<std::string, Overrides>, Loaded> loaded_;
};
std::unique_ptr<TemporaryDirectory> RecipeKeys::files_;

std::vector<Sweep> RecipeKeys::flexmore() {
  const std::string recipe = R"(
name: sweep
method: flexmore
model:
  architecture: {hidden_size: 16, intermediate_size: 24, num_layers: 1, num_heads: 2, num_kv_heads: 2, max_position_embeddings: 64}
  train: {steps: 6, batch_size: 4}
public_path: text/public.h5
domains: [{name: left, path: text/left.h5}, {name: right, path: text/right.h5}]
seq_len: 32
ranks: {candidates: [2, 4], budget: 0.9}
)";
  const Overrides encoded = {
      "router.init=encoder", "router.encoder=" + file("encoder"), "public_encoder_text=" + file("encoded/public.h5"),
      "domains.0.encoder_text=" + file("encoded/left.h5"), "domains.1.encoder_text=" + file("encoded/right.h5")};
  Change encoder = {.context = encoded, .moved = {"router.encoder=" + file("copies/encoder")}};
  std::map<std::string, Change> changes = {
      {"name", {.change = {"name=other"}}},
      {"workers.arithmetic", {.change = {"workers.arithmetic=portable"}}},
      {"run_dir", {.change = {"run_dir=elsewhere"}}},
      {"model.architecture.num_heads", {.change = {"model.architecture.num_heads=4"}}},
      {"model.architecture.num_kv_heads", {.change = {"model.architecture.num_kv_heads=1"}}},
      {"model.architecture.hidden_size", {.change = {"model.architecture.hidden_size=20"}}},
      {"public_path", path_change("public_path", "text/public.h5", "text/right.h5")},
      {"public_encoder_text", path_change("public_encoder_text", "encoded/public.h5", "encoded/right.h5", encoded)},
      {"domains.0.name", {.change = {"domains.0.name=links"}}},
      {"domains.0.path", path_change("domains.0.path", "text/left.h5", "text/public.h5")},
      {"domains.0.encoder_text",
       path_change("domains.0.encoder_text", "encoded/left.h5", "encoded/public.h5", encoded)},
      {"domains.0.rank", {.change = {"domains.0.rank=full"}}},
      {"domains.0.train", {.context = {"domains.0.rank=4"}, .change = {"domains.0.train=direct"}}},
      {"router.encoder", encoder},
      {"router.init_norm", {.context = {"router.init=embedding"}}},
      {"router.bias_value", {.context = {"router.bias=constant"}}},
      {"ranks.budget", {.change = {"ranks.budget=0.35"}}},
      {"train.momentum", {.context = {"train.optimizer=sgd"}}},
      {"model.train.momentum", {.context = {"model.train.optimizer=sgd"}}},
      {"top_k", {.configured = true}},
      {"tokenizer", {.change = {"tokenizer=hf:other"}, .refused = true}},
      {"model.path", {.elsewhere = true}},
      {"model.train.dtype", {.refused = true}},
      {"leave_out", {.change = {"leave_out=[right]"}}},
      {"domains.0.learning_rate", {.change = {"domains.0.learning_rate=0.01"}}},
  };
  // Keys of a direct expert's adapter, which are of a recipe that has one.
  const std::string adapter = "domains.0.adapter.";
  const std::string direct = R"(
name: sweep
method: flexmore
model: {path: model1}
public_path: text/public.h5
domains: [{name: left, path: text/left.h5, train: direct, adapter: {rank: 2, alpha_pattern: [{module: up_proj, alpha: 2}]}}]
seq_len: 32
ranks: {candidates: [2, 4]}
)";
  std::map<std::string, Change> of_adapter;
  for (const char* key : {"alpha", "alpha_pattern.0.alpha", "dropout", "init", "lr_ratio", "rank", "use_rslora"})
    of_adapter[adapter + key] = {};
  const auto set = [&](const std::string& key, const std::string& value) { return adapter + key + "=" + value; };
  of_adapter[adapter + "type"] = {.change = {set("type", "dora")}};
  of_adapter[adapter + "options"] = {.context = {set("type", "dylora")}, .change = {set("options", "{frozen: false}")}};
  of_adapter[adapter + "alpha_pattern.0.module"] = {.change = {set("alpha_pattern.0.module", "gate_proj")}};
  for (const auto& [key, value] : std::map<std::string, std::string>{{"target_modules", "[up_proj]"},
                                                                     {"target_regex", ".*up_proj"},
                                                                     {"exclude_modules", "[up_proj]"},
                                                                     {"exclude_regex", ".*up_proj"},
                                                                     {"layers_to_transform", "[0]"}})
    of_adapter[adapter + key] = {.change = {set(key, value)}, .refused = true};
  for (const char* key : {"rank_pattern.0.module", "rank_pattern.0.rank"})
    of_adapter[adapter + key] = {.change = {set("rank_pattern", "[{module: up_proj, rank: 1}]")}, .refused = true};
  std::set<std::string> adapter_keys;
  for (const auto& [key, change] : of_adapter) adapter_keys.insert(key), changes[key] = {.elsewhere = true};
  return {
      {"flexmore", recipe, std::move(changes), {}},
      {"flexmore", direct, std::move(of_adapter), std::move(adapter_keys)},
      {"flexmore",
       recipe,
       {{"model.path", path_change("model.path", "model1", "model2",
                                   {"model.architecture=null", "model.train=null", "model.path=" + file("model1")})}},
       {"model.path"}}};
}

std::vector<Sweep> RecipeKeys::federated(const std::string& method) {
  const std::string recipe = fmt::format(R"(
name: sweep
method: {}
model: {{path: model1}}
domains: [{{name: left, path: text/left.h5}}, {{name: right, path: text/right.h5}}]
seq_len: 32
clients: {{count: 4, per_round: 2}}
rounds: 2
lora: {{rank: 2, alpha: 4, target_modules: [q_proj, down_proj]}}
train: {{steps: 2, batch_size: 2}}
)",
                                         method);
  const bool mixed = method == "flora" || method == "flexlora" || method == "hetlora",
             exact = method == "flora" || method == "flexlora" || method == "fedex_lora", prunes = method == "hetlora",
             averages = method == "fedit", pairs = method == "flexlora";
  const Overrides adam = {"server.optimizer=fedadam"};
  const Overrides ranks = {"lora.rank_pattern=[{module: q_proj, rank: 1}]"};
  const Overrides alphas = {"lora.alpha_pattern=[{module: q_proj, alpha: 1}]"};
  return {{method,
           recipe,
           {
               {"name", {.change = {"name=other"}}},
               {"workers.arithmetic", {.change = {"workers.arithmetic=portable"}}},
               {"run_dir", {.change = {"run_dir=elsewhere"}}},
               {"model.path", path_change("model.path", "model1", "model2")},
               {"domains.0.name", {.change = {"domains.0.name=links"}}},
               {"domains.0.path", path_change("domains.0.path", "text/left.h5", "text/public.h5")},
               {"tokenizer", {.change = {"tokenizer=hf:other"}, .refused = true}},
               {"clients.alpha", {.context = {"clients.partition=dirichlet", "clients.alpha=50"}}},
               {"clients.ranks", {.change = {"clients.ranks=[1, 2]"}, .refused = !mixed}},
               {"clients.weighting", {.refused = prunes}},
               {"clients.proximal", {.change = {"clients.proximal=0.1"}, .refused = method == "flora"}},
               {"pruning.gamma", {.refused = !prunes}},
               {"pruning.lambda", {.refused = !prunes}},
               {"pruning.min_rank", {.refused = !prunes}},
               {"server.optimizer", {.refused = exact}},
               {"server.learning_rate", {.context = adam, .refused = exact}},
               {"server.beta1", {.context = adam, .refused = exact}},
               {"server.beta2", {.context = adam, .refused = exact}},
               {"server.tau", {.context = adam, .refused = exact}},
               {"lora.type", {.change = {"lora.type=dora"}, .refused = !averages}},
               {"lora.init", {.change = {"lora.init=gaussian"}}},  // eva needs examples
               {"lora.options", {.change = {"lora.options={n: 2}"}, .refused = true}},
               {"lora.target_modules", {.change = {"lora.target_modules=[v_proj]"}}},
               {"lora.target_regex", {.change = {"lora.target_regex=.*k_proj"}}},
               {"lora.exclude_modules", {.change = {"lora.exclude_modules=[q_proj]"}}},
               {"lora.exclude_regex", {.change = {"lora.exclude_regex=.*q_proj"}}},
               {"lora.layers_to_transform", {.change = {"lora.layers_to_transform=[0]"}}},
               {"lora.rank_pattern.0.module", {.change = ranks, .refused = prunes || pairs}},
               {"lora.rank_pattern.0.rank", {.change = ranks, .refused = prunes || pairs}},
               {"lora.alpha_pattern.0.module", {.change = alphas, .refused = prunes}},
               {"lora.alpha_pattern.0.alpha", {.change = alphas, .refused = prunes}},
               {"train.momentum", {.context = {"train.optimizer=sgd"}}},
               {"evaluation.every", {.context = {"rounds=3"}}},
           },
           {}}};
}

// Keys of an adapter whose rank_pattern names query and whose alpha_pattern names value.
void RecipeKeys::change_adapter(const std::string& at, std::map<std::string, Change>& changes) {
  const auto set = [&](const std::string& key, const std::string& value) { return at + key + "=" + value; };
  changes[at + "type"] = {.change = {set("type", "dora")}};
  changes[at + "init"] = {.change = {set("init", "gaussian")}};  // eva needs examples
  changes[at + "options"] = {.context = {set("type", "dylora"), set("rank_pattern", "[]")},
                             .change = {set("options", "{frozen: false}")}};
  changes[at + "target_modules"] = {.change = {set("target_modules", "[query, value, key]")}};
  changes[at + "target_regex"] = {.change = {set("target_regex", ".*query|.*value|.*key")}};
  changes[at + "exclude_modules"] = {.context = {set("target_modules", "[query, value, key]")},
                                     .change = {set("exclude_modules", "[key]")}};
  changes[at + "exclude_regex"] = {.context = {set("target_modules", "[query, value, key]")},
                                   .change = {set("exclude_regex", ".*key")}};
  changes[at + "layers_to_transform"] = {.change = {set("layers_to_transform", "[0]")}};
  changes[at + "rank_pattern.0.module"] = {.change = {set("rank_pattern.0.module", "value")}};
  changes[at + "alpha_pattern.0.module"] = {.change = {set("alpha_pattern.0.module", "query")}};
}

std::vector<Sweep> RecipeKeys::continual() {
  std::string recipe = R"(
name: sweep
method: continual
model:
  architecture: {image_size: 8, patch_size: 4, hidden_size: 8, intermediate_size: 12, num_layers: 1, num_heads: 2}
  data_path: images/others.h5
  train: {steps: 4, batch_size: 8}
images: {path: images/images.h5}
stream: {increment: 2, validation_per_class: 2}
train: {steps: 4, batch_size: 8}
methods: [joint, finetune, finetune_local, seq_lora, seq_lora_local, o_lora, linear_probe, ewc, lwf, er, simplecil, ranpac]
learners:
  seq_lora: {adapter: ADAPTER, train: {steps: 3, batch_size: 8}}
  o_lora: {adapter: ADAPTER, train: {steps: 3, batch_size: 8}}
  linear_probe: {train: {steps: 3, batch_size: 8}}
  ewc: {adapter: ADAPTER, train: {steps: 3, batch_size: 8}}
  lwf: {adapter: ADAPTER, train: {steps: 3, batch_size: 8}}
  er: {adapter: ADAPTER, train: {steps: 3, batch_size: 8}}
)";
  std::map<std::string, Change> changes = {
      {"name", {.change = {"name=other"}}},
      {"workers.arithmetic", {.change = {"workers.arithmetic=portable"}}},
      {"run_dir", {.change = {"run_dir=elsewhere"}}},
      {"model.path", {.change = {"model.path=" + file("model1")}, .refused = true}},
      {"model.image_size", {.change = {"model.image_size=12"}, .refused = true}},
      {"model.data_path", path_change("model.data_path", "images/others.h5", "images/strangers.h5")},
      {"model.architecture.image_size", {.change = {"model.architecture.image_size=12"}}},
      {"model.architecture.patch_size", {.change = {"model.architecture.patch_size=2"}}},
      {"model.architecture.hidden_size", {.change = {"model.architecture.hidden_size=12"}}},
      {"model.architecture.num_heads", {.change = {"model.architecture.num_heads=4"}}},
      {"images.path", path_change("images.path", "images/images.h5", "images/strangers.h5")},
      {"stream.tasks.0.classes", {.change = {"stream.tasks=[{classes: [0, 1]}, {classes: [2, 3, 4, 5]}]"}}},
      {"stream.leave_out", {.change = {"stream.leave_out=[5]"}}},
      {"stream.train_per_class", {.context = {"stream.train_per_class=6"}}},
      {"orders", {.change = {"orders=[1993]"}}},
      {"seeds", {.change = {"seeds=[5]"}}},
      {"train.momentum", {.context = {"train.optimizer=sgd"}}},
      {"train.dtype", {.refused = true}},
      {"model.train.momentum", {.context = {"model.train.optimizer=sgd"}}},
      {"model.train.dtype", {.refused = true}},
      {"metrics", {.only_drawn = true}},
  };
  const std::string adapter =
      "{rank: 2, target_modules: [query, value], rank_pattern: [{module: query, rank: 1}], alpha_pattern: [{module: "
      "value, alpha: 2}]}";
  for (size_t at = recipe.find("ADAPTER"); at != std::string::npos; at = recipe.find("ADAPTER"))
    recipe.replace(at, 7, adapter);
  for (const std::string learner : {"seq_lora", "o_lora", "linear_probe", "ewc", "lwf", "er"}) {
    const std::string train = "learners." + learner + ".train.";
    changes[train + "momentum"] = {.context = {train + "optimizer=sgd"}};
    changes[train + "dtype"] = {.refused = true};
    if (learner != "linear_probe") change_adapter("learners." + learner + ".adapter.", changes);
  }
  for (const std::string key : {"type", "options", "init"}) {  // o_lora is of plain LoRAs
    const std::string at = "learners.o_lora.adapter.";
    changes[at + key] = {.change = {at + (key == "init" ? "init=pissa" : "type=dylora")}, .refused = true};
  }
  const std::string texts = R"(
name: sweep
method: continual
model: {path: model1}
texts: {path: examples/labelled.h5}
stream: {increment: 2}
train: {steps: 4, batch_size: 8}
methods: [simplecil]
)";
  changes["texts.path"] = changes["stream.tasks.0.path"] = {.elsewhere = true};
  const std::map<std::string, Change> of_texts = {
      {"texts.path", path_change("texts.path", "examples/labelled.h5", "examples/relabelled.h5")},
      {"stream.tasks.0.path",
       path_change("stream.tasks.0.path", "examples/labelled.h5", "examples/relabelled.h5",
                   {"texts=null", "stream.tasks=[{path: " + file("examples/labelled.h5") + "}]"})}};
  return {{"continual", recipe, std::move(changes), {}},
          {"continual", texts, of_texts, {"texts.path", "stream.tasks.0.path"}}};
}

std::vector<Sweep> RecipeKeys::finetune() {
  const std::string recipe = R"(
name: sweep
method: finetune
model: {path: model1}
tasks: [{name: left, path: text/left.h5}, {name: right, path: text/right.h5}]
seq_len: 32
adapters:
  - {name: one, adapter: {rank: 2, target_modules: [q_proj, v_proj], rank_pattern: [{module: q_proj, rank: 1}], alpha_pattern: [{module: v_proj, alpha: 2}]}}
train: {steps: 4, batch_size: 2}
)";
  const std::string adapter = "adapters.0.adapter.";
  const auto set = [&](const std::string& key, const std::string& value) { return adapter + key + "=" + value; };
  const Overrides stopping = {"early_stopping={every: 2}"};
  std::map<std::string, Change> changes = {
      {"name", {.change = {"name=other"}}},
      {"workers.arithmetic", {.change = {"workers.arithmetic=portable"}}},
      {"run_dir", {.change = {"run_dir=elsewhere"}}},
      {"model.path", path_change("model.path", "model1", "model2")},
      {"model.image_size", {.change = {"model.image_size=9"}, .refused = true}},
      {"tasks.0.name", {.change = {"tasks.0.name=links"}}},
      {"tasks.0.path", path_change("tasks.0.path", "text/left.h5", "text/public.h5")},
      {"tokenizer", {.change = {"tokenizer=hf:other"}, .refused = true}},
      {"seeds", {.change = {"seeds=[5]"}}},
      {"adapters.0.name", {.change = {"adapters.0.name=other"}}},
      {"adapters.0.learning_rate", {.change = {"adapters.0.learning_rate=0.01"}}},
      {"adapters.0.optimizer", {.change = {"adapters.0.optimizer=sgd"}}},
      {"adapters.0.galore.rank", {.elsewhere = true}},
      {"adapters.0.galore.update_proj_gap", {.elsewhere = true}},
      {"adapters.0.galore.scale", {.elsewhere = true}},
      {"adapters.0.galore.proj_type", {.elsewhere = true}},
      {"adapters.0.galore.target_modules", {.elsewhere = true}},
      {"adapters.0.start", {.change = {"adapters.0.start=" + file("adapter1")}, .refused = true}},
      {adapter + "type", {.change = {set("type", "dora")}}},
      {adapter + "options",
       {.context = {set("type", "dylora"), set("rank_pattern", "[]")}, .change = {set("options", "{frozen: false}")}}},
      {adapter + "target_modules", {.change = {set("target_modules", "[q_proj, v_proj, k_proj]")}}},
      {adapter + "target_regex", {.change = {set("target_regex", ".*(q|v|k)_proj")}}},
      {adapter + "exclude_modules",
       {.context = {set("target_modules", "[q_proj, v_proj, k_proj]")},
        .change = {set("exclude_modules", "[k_proj]")}}},
      {adapter + "exclude_regex",
       {.context = {set("target_modules", "[q_proj, v_proj, k_proj]")}, .change = {set("exclude_regex", ".*k_proj")}}},
      {adapter + "layers_to_transform", {.change = {set("layers_to_transform", "[0]")}}},
      {adapter + "rank_pattern.0.module", {.change = {set("rank_pattern.0.module", "v_proj")}}},
      {adapter + "alpha_pattern.0.module", {.change = {set("alpha_pattern.0.module", "q_proj")}}},
      {"train.momentum", {.context = {"train.optimizer=sgd"}}},
      {"adapters.0.head_only", {.change = {"adapters=[{name: one, head_only: true}]"}, .refused = true}},
      {"tasks.0.packing", {.elsewhere = true}},
      {"tasks.0.mean", {.elsewhere = true}},
      {"tasks.0.deviation", {.elsewhere = true}},
      {"tasks.0.validation_share", {.elsewhere = true}},
      {"early_stopping.every", {.context = stopping}},
      {"early_stopping.patience", {.context = stopping}},
      {"early_stopping.min_delta", {.context = stopping}},
      {"early_stopping.restore_best", {.context = stopping}},
      {"early_stopping.sequences", {.context = stopping}},
      {"update_in_backward", {.context = {"train.clip_norm=0"}}},
      {"evaluation.ranks", {.context = {set("rank_pattern", "[]")}, .change = {"evaluation.ranks=[1]"}}},
  };
  const Overrides galore = {"adapters.0.adapter=null", "adapters.0.galore.rank=2"};
  std::map<std::string, Change> in_subspaces;
  std::set<std::string> keys;
  for (const std::string key : {"rank", "update_proj_gap", "scale", "proj_type", "target_modules"}) {
    const std::string at = "adapters.0.galore." + key;
    in_subspaces[at] = {.context = galore};
    keys.insert(at);
  }
  in_subspaces["adapters.0.galore.target_modules"].change = {"adapters.0.galore.target_modules=[q_proj]"};
  const std::string completions = R"(
name: sweep
method: finetune
model: {path: model1}
tasks: [{name: one, path: examples/completion.h5}]
seq_len: 32
adapters: [{name: one, adapter: {rank: 2}}]
train: {steps: 4, batch_size: 2}
)";
  const std::string images = R"(
name: sweep
method: finetune
model: {path: vit}
tasks: [{name: one, path: images/images.h5, validation_share: 0.2}]
adapters: [{name: one, adapter: {rank: 2}}]
train: {steps: 4, batch_size: 2}
)";
  const std::map<std::string, Change> named = {
      {"model.image_size", {.change = {"model.image_size=9"}}},
      {"adapters.0.head_only", {.change = {"adapters=[{name: one, head_only: true}]"}}}};
  return {
      {"finetune", recipe, std::move(changes), {}},
      {"finetune", recipe, std::move(in_subspaces), std::move(keys)},
      {"finetune", completions, {}, {"tasks.0.packing"}},
      {"finetune",
       images,
       named,
       {"tasks.0.mean", "tasks.0.deviation", "tasks.0.validation_share", "adapters.0.head_only", "model.image_size"}}};
}

std::vector<Sweep> RecipeKeys::sweeps_of(const std::string& method) {
  if (method == "flexmore") return flexmore();
  if (method == "continual") return continual();
  if (method == "finetune") return finetune();
  return federated(method);
}

const RecipeKeys::Loaded& RecipeKeys::load(const std::string& recipe, const Overrides& overrides) {
  const auto known = loaded_.find({recipe, overrides});
  if (known != loaded_.end()) return known->second;
  const fs::path path = files_->write("recipe.yaml", recipe);
  ParsedRecipe parsed = load_recipe(path, overrides);
  parsed.method->open_inputs();
  Loaded loaded{parsed.values, parsed.resolved, plan_to_the_end(*parsed.method)};
  const auto restored = find_method(parsed.run.method).restore(parsed.values, parsed.method->inputs());
  EXPECT_EQ(plan_to_the_end(*restored).work, loaded.ids.work) << "a recorded run plans something else";
  return loaded_.emplace(std::pair(recipe, overrides), std::move(loaded)).first->second;
}

Overrides joined(Overrides first, const Overrides& second) {
  first.insert(first.end(), second.begin(), second.end());
  return first;
}

std::string written(const std::vector<core::ResolvedValue>& resolved) {
  std::string text;
  for (const auto& value : resolved) text += value.path + ": " + value.value + "\n";
  return text;
}

void RecipeKeys::examine(const Sweep& sweep, const Key& key) {
  SCOPED_TRACE(sweep.method + ": " + key.path);
  const auto found = sweep.changes.find(key.path);
  Change how = found == sweep.changes.end() ? Change{} : found->second;
  if (how.refused && !how.context.empty()) {
    EXPECT_THROW(load(sweep.recipe, how.context), core::UserError);
    return;
  }
  const Loaded& base = load(sweep.recipe, how.context);
  for (const auto& moved : how.moved)
    EXPECT_EQ(load(sweep.recipe, joined(how.context, {moved})).ids, base.ids) << "the same bytes elsewhere: " << moved;
  if (how.change.empty()) {
    Json value = value_at(base.values, key.path);
    if (value.is_null()) value = key.fallback;
    const Json other = another(key.schema, value);
    if (other.is_null()) {  // a key of one value, or one whose change has to be named above
      EXPECT_TRUE((key.schema.value("type", "") != "string" && !value.is_object()) || !how.moved.empty())
          << "no other value known";
      return;
    }
    how.change = {key.path + "=" + other.dump()};
  }
  SCOPED_TRACE(testing::PrintToString(how.change));
  if (how.refused) {
    EXPECT_THROW(load(sweep.recipe, joined(how.context, how.change)), core::UserError);
    return;
  }
  const Loaded& changed = load(sweep.recipe, joined(how.context, how.change));
  EXPECT_NE(changed.values, base.values) << "recipe.json does not hold it";
  EXPECT_NE(written(changed.resolved), written(base.resolved)) << "report and resolved.yaml do not hold it";
  const Ids &before = base.ids, &after = changed.ids;
  if (key.doc.ends_with("Never changes a result.") || key.path == "run_dir") {
    EXPECT_TRUE(after == before) << "changes ids of units";
  } else if (key.doc.ends_with("Evaluation only.")) {
    EXPECT_TRUE(std::includes(after.work.begin(), after.work.end(), before.work.begin(), before.work.end()))
        << "changes more than measurements";
    EXPECT_EQ(after.measurements == before.measurements, how.only_drawn) << "reaches no measurement";
  } else if (how.configured) {
    EXPECT_FALSE(after.measurements == before.measurements) << "reaches no measurement";
  } else {
    EXPECT_FALSE(after.work == before.work) << "reaches no result: " << key.doc;
  }
}

// Of paths: the same bytes elsewhere change nothing, other bytes do.
TEST_P(RecipeKeys, ChangeWhatTheirDocumentationSays) {
  std::set<std::string> examined;
  for (const Sweep& sweep : sweeps_of(GetParam()))
    for (const Key& key : keys_of(find_method(GetParam()))) {
      if (key.path == "method" || (!sweep.only.empty() && !sweep.only.contains(key.path))) continue;
      if (sweep.only.empty() && sweep.changes.contains(key.path) && sweep.changes.at(key.path).elsewhere) continue;
      examined.insert(key.path);
      examine(sweep, key);
    }
  for (const Key& key : keys_of(find_method(GetParam())))
    EXPECT_TRUE(key.path == "method" || examined.contains(key.path)) << "no recipe of the sweep covers " << key.path;
}

std::vector<std::string> method_names() {
  std::vector<std::string> names;
  for (const auto& entry : methods()) names.push_back(entry.name);
  return names;
}
INSTANTIATE_TEST_SUITE_P(Methods, RecipeKeys, testing::ValuesIn(method_names()),
                         [](const auto& each) { return each.param; });

}  // namespace
}  // namespace moraine::algorithms
