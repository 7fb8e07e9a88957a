#include "tests/sweeps/sweeps.h"

namespace moraine::algorithms {

std::vector<Sweep> Sweeps::finetune() const {
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

}  // namespace moraine::algorithms
