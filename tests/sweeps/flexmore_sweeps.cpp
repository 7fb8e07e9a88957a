#include "tests/sweeps/sweeps.h"

namespace moraine::algorithms {

std::vector<Sweep> Sweeps::flexmore() const {
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

}  // namespace moraine::algorithms
