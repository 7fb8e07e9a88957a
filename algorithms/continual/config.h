#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "algorithms/continual/examples.h"
#include "algorithms/continual/learners_config.h"
#include "algorithms/run_config.h"
#include "algorithms/worker_context.h"
#include "core/config.h"
#include "data/task_stream.h"
#include "models/open_backbone.h"
#include "models/vit_config.h"

namespace moraine::algorithms::continual {

/// Shapes of a vision transformer that is built from the seed instead of loaded.
struct ArchitectureConfig {
  int64_t image_size = 28, patch_size = 7, num_channels = 1;
  int64_t hidden_size = 64, intermediate_size = 128, num_layers = 3, num_heads = 4;
};

/// The frozen backbone all learners start from: a directory of any family, or shapes, or shapes trained on a data set
/// that shares no class with the stream.
struct BackboneConfig {
  std::string path;                                // Hugging Face or timm directory; exclusive with `architecture`
  int64_t image_size = 0;                          // at which the model of `path` is run; 0 = its own
  std::optional<ArchitectureConfig> architecture;  // without `train`: random weights, a control
  std::string data_path;                           // prepared images it is trained on, with their labels
  std::optional<TrainConfig> train;
};

/// One task: labels of the stream's examples, or a file of texts of its own.
struct TaskConfig {
  std::vector<int64_t> classes;
  std::string path;
};
struct StreamConfig {
  std::vector<TaskConfig> tasks;
  int64_t base_classes = 0, increment = 2;
  std::vector<int64_t> leave_out;
  int64_t train_per_class = 0, test_per_class = 0, validation_per_class = 0;
};

struct EvaluationConfig {
  int64_t batch_size = 100;
  std::string split = "test";  // test | validation
  bool ahead = true;           // evaluate tasks before they are trained (task-incremental), and the initial model
};

struct ContinualConfig : RunConfig {
  BackboneConfig model;
  std::optional<ImagesConfig> images;  // exactly one of images, texts and tasks with paths
  std::optional<TextsConfig> texts;
  StreamConfig stream;
  std::vector<int64_t> orders = {-1};  // class orders: -1 = as labels stand, else a seed
  std::vector<int64_t> seeds;          // of initial values and data order; empty = the run's seed
  std::vector<std::string> methods = {"finetune", "joint", "seq_lora", "simplecil"};
  TrainConfig train;  // of one task; joint training takes `steps` per task it sees
  LearnersConfig learners;
  EvaluationConfig evaluation;
  std::vector<std::string> metrics;  // empty = the canonical ones that the cells give

  std::vector<int64_t> all_seeds() const { return seeds.empty() ? std::vector<int64_t>{seed} : seeds; }
  /// Files of texts: one, or one of each task; none for images.
  std::vector<std::string> text_paths() const;
  /// `file_classes`: numbers of classes of each task's file, where tasks have files.
  data::TaskStreamSpec stream_spec(int64_t order, const std::vector<int64_t>& file_classes) const;
};

const core::Schema<ContinualConfig>& continual_schema();

/// The recipe of a run that was recorded when learners' options stood at its root (`lora`, `lora_train`), as it is
/// written today.
core::Json modernised(core::Json values);
/// Reads a recipe; says where keys have moved that stood at its root before.
void parse_continual(const core::ConfigNode& root, ContinualConfig& config, core::Problems& problems);

/// Of a backbone that is built from the seed.
models::VitConfig vit_config(const ArchitectureConfig& shapes);
/// The model in `model.path`, without classifier, at the size of images that the recipe says.
std::unique_ptr<models::Backbone> open_backbone(const BackboneConfig& model, std::optional<at::ScalarType> dtype);
/// What plans know of it; of a directory or, without one, of the shapes.
models::ModelFacts backbone_facts(const BackboneConfig& model);
models::ModelFacts vit_facts(const models::VitConfig& shapes);
/// The same without its slots, which takes no time.
models::ModelFacts vit_shapes(const models::VitConfig& shapes);

}  // namespace moraine::algorithms::continual
