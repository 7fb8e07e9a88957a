#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "algorithms/adapters/config.h"
#include "algorithms/galore/galore.h"
#include "algorithms/run_config.h"
#include "algorithms/worker_context.h"
#include "core/config.h"

namespace moraine::algorithms::finetune {

struct ModelConfig {
  std::string path;  // Hugging Face directory of a decoder
};

/// Prepared text to fit; its held-out documents are what is measured.
struct TaskConfig {
  std::string name;
  std::string path;
};

/// One way to fit the model.
struct EntryConfig {
  std::string name;
  std::optional<adapters::AdapterConfig> adapter;  // neither this nor `start` = all weights are trained
  std::optional<galore::GaLoreConfig> galore;      // of all weights: moments in subspaces
  std::string start;                               // PEFT directory: its adapter is trained further
  std::optional<double> learning_rate;             // instead of train.learning_rate
  std::optional<std::string> optimizer;            // instead of train.optimizer
};

struct EvaluationConfig {
  int64_t sequences = 128;  // per task; 0 = all
  int64_t batch_size = 16;
  std::string split = "test";  // test | validation
  bool every_task = true;      // score each adapter on every task, not only on its own
};

struct FinetuneConfig : RunConfig {
  ModelConfig model;
  std::vector<TaskConfig> tasks;
  std::vector<EntryConfig> adapters;
  std::vector<int64_t> seeds;  // empty = the run's seed alone
  int64_t seq_len = 256;
  std::string tokenizer = "bytes-v1";
  TrainConfig train;
  EvaluationConfig evaluation;

  std::vector<int64_t> all_seeds() const { return seeds.empty() ? std::vector<int64_t>{seed} : seeds; }
};

const core::Schema<FinetuneConfig>& finetune_schema();

}  // namespace moraine::algorithms::finetune
