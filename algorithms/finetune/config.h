#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "algorithms/adapters/config.h"
#include "algorithms/finetune/early_stopping.h"
#include "algorithms/galore/galore.h"
#include "algorithms/run_config.h"
#include "algorithms/worker_context.h"
#include "core/config.h"

namespace moraine::algorithms::finetune {

struct ModelConfig {
  std::string path;        // Hugging Face (or timm) directory
  int64_t image_size = 0;  // at which a vision transformer is run; 0 = its own

  std::optional<int64_t> size() const { return image_size > 0 ? std::optional(image_size) : std::nullopt; }
};

/// Prepared text, examples or images to fit; what is held out is what is measured.
struct TaskConfig {
  std::string name;
  std::string path;
  bool packing = false;
  double mean = 0.5, deviation = 0.5;
  double validation_share = 0;
};

/// One way to fit the model. A task that needs a head trains one beside.
struct EntryConfig {
  std::string name;
  std::optional<adapters::AdapterConfig> adapter;  // none of these three = all weights are trained
  std::optional<galore::GaLoreConfig> galore;      // of all weights: moments in subspaces
  std::string start;                               // PEFT directory: its adapter is trained further
  bool head_only = false;                          // nothing but the task's head
  std::optional<double> learning_rate;             // instead of train.learning_rate
  std::optional<std::string> optimizer;            // instead of train.optimizer
};

struct EvaluationConfig {
  int64_t sequences = 128;  // per task (examples, questions, images); 0 = all
  int64_t batch_size = 16;
  std::string split = "test";  // test | validation
  bool every_task = true;      // score each adapter on every task, not only on its own
  std::vector<int64_t> ranks;  // score adapters cut to these ranks, too
};

struct FinetuneConfig : RunConfig {
  ModelConfig model;
  std::vector<TaskConfig> tasks;
  std::vector<EntryConfig> adapters;
  std::vector<int64_t> seeds;  // empty = the run's seed alone
  int64_t seq_len = 256;
  std::string tokenizer;  // "" = the files' own
  double label_smoothing = 0;
  bool gradient_checkpointing = false;  // not part of a unit's identity, nor is the next
  bool update_in_backward = false;
  TrainConfig train;
  std::optional<EarlyStoppingConfig> early_stopping;
  EvaluationConfig evaluation;

  std::vector<int64_t> all_seeds() const { return seeds.empty() ? std::vector<int64_t>{seed} : seeds; }
};

const core::Schema<FinetuneConfig>& finetune_schema();

}  // namespace moraine::algorithms::finetune
