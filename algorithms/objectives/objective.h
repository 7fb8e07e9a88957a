#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "algorithms/evaluate.h"
#include "algorithms/objectives/head.h"
#include "algorithms/worker_context.h"
#include "core/config.h"
#include "models/open_backbone.h"

namespace moraine::algorithms::objectives {

// What a task asks of a model: data, loss and scores. The kind of the prepared file decides which it is:
//   text            next tokens of documents that follow each other          (scripts/prepare_text.py)
//   completion      the tokens behind a prompt                                (scripts/prepare_examples.py)
//   choice          the right one of several completions                      (scripts/prepare_examples.py)
//   classification  the class of a text, by a head on the model's features    (scripts/prepare_examples.py)
//   images          the class of an image, by such a head                     (scripts/prepare_images.py)

/// What of a recipe's task shapes what is computed.
struct TaskOptions {
  int64_t seq_len = 0;                 // tokens of a row: text, completion, choice
  std::string tokenizer = {};          // the file must have been made with it; "" = any
  bool packing = false;                // completion: short examples share a row, none sees another
  double label_smoothing = 0;          // share of a target that is spread over all; in training alone
  double mean = 0.5, deviation = 0.5;  // images: (pixel / 255 - mean) / deviation
  double validation_share = 0;         // images: of the training images, kept for validation
};

/// A split of a task's data, as units name it. Fields without meaning for the objective keep their neutral value.
struct DataSpec {
  std::string name = {};  // which of the recipe's tasks; its path is the worker's own
  std::string objective = "text";
  std::string fingerprint = {};
  std::string split = "train";
  int64_t classes = 0;  // rows of the head; 0 = none
  TaskOptions options = {};
};
const core::Schema<DataSpec>& data_schema();

/// What a prepared file says of itself; recorded with a run, so that plans and reports need no file.
struct TaskFacts {
  std::string objective = {}, fingerprint = {};
  int64_t classes = 0;
  int64_t tokens_per_row = 1;        // of training
  int64_t train = 0, evaluated = 0;  // rows
  int64_t validation = 0;            // rows, where training is to look at them

  core::Json to_json() const;
  static TaskFacts from_json(const core::Json& json);
};

/// How a report reads an evaluation.
struct Metric {
  std::string name;  // "bits per byte", "accuracy, %"
  bool higher_is_better = false;
  double (*of)(const Evaluation&) = nullptr;
};
const Metric& metric_of(const std::string& objective);

/// Where the model is, and whether images are to be scaled to the size at which it is run.
struct ModelPlace {
  std::filesystem::path directory = {};
  bool scales_images = false;
};

/// Opens the splits for training and evaluation once. Throws UserError: as the datasets' open(), when the model cannot
/// do what the task asks, and when file and model have other tokenisers or sizes.
TaskFacts inspect(const std::filesystem::path& path, const std::string& split, const TaskOptions& options,
                  const models::ModelFacts& model, const ModelPlace& place);

/// The options that mean something for a split of `objective`, all others neutral.
TaskOptions relevant(const TaskOptions& options, const std::string& objective, const std::string& split);

/// An objective on one split of one file. Pure but for the model it is given; thread-safe.
class Objective {
 public:
  virtual ~Objective() = default;
  /// Rows of training batches: an endless pass in an order drawn by (seed, epoch).
  struct Rows {
    uint64_t seed = 0;
    int64_t first = 0, count = 0;  // first counts from the start of training
  };
  virtual TrainJob::MicroLoss loss(models::Backbone& model, const Head& head, const Rows& rows) const = 0;
  /// Sums over rows of the split, without gradients. Throws NumericError if they are not finite.
  virtual Evaluation score(models::Backbone& model, const Head& head, const ScoredRows& rows, int64_t batch_size,
                           WorkerContext& context) const = 0;
  virtual int64_t tokens_per_row() const { return 1; }
  /// Of its file.
  virtual const std::string& fingerprint() const = 0;
};

/// What `spec` names, opened once per worker. Throws UserError if the file has changed since the run was planned.
std::shared_ptr<const Objective> open_objective(const std::filesystem::path& path, const DataSpec& spec,
                                                const models::ModelFacts& model, WorkerContext& context);

// One of each objective's file.
std::shared_ptr<const Objective> text_objective(const std::filesystem::path& path, const DataSpec& spec);
std::shared_ptr<const Objective> completion_objective(const std::filesystem::path& path, const DataSpec& spec);
std::shared_ptr<const Objective> choice_objective(const std::filesystem::path& path, const DataSpec& spec);
std::shared_ptr<const Objective> classification_objective(const std::filesystem::path& path, const DataSpec& spec);
std::shared_ptr<const Objective> images_objective(const std::filesystem::path& path, const DataSpec& spec,
                                                  const models::ModelFacts& model, at::Device device);
/// Rows of the training images kept for validation, and the others; both sorted.
struct ImageRows {
  std::vector<int64_t> train, validation;
};
ImageRows image_rows(int64_t images, double validation_share);

}  // namespace moraine::algorithms::objectives
