#include "tests/sweeps/sweeps.h"

#include <fmt/format.h>

namespace moraine::algorithms {

std::vector<Sweep> Sweeps::federated(const std::string& method) const {
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

}  // namespace moraine::algorithms
