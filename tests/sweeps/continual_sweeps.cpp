#include "tests/sweeps/sweeps.h"

namespace moraine::algorithms {

// Keys of an adapter whose rank_pattern names query and whose alpha_pattern names value.
void Sweeps::change_adapter(const std::string& at, std::map<std::string, Change>& changes) {
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

std::vector<Sweep> Sweeps::continual() const {
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

}  // namespace moraine::algorithms
