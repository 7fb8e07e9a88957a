#include "algorithms/finetune/config.h"

#include <set>

#include "core/error.h"
#include "core/file_name.h"

namespace moraine::algorithms::finetune {
namespace {

using Violation = std::optional<std::string>;

const core::Schema<ModelConfig>& model_schema() {
  static const auto schema = core::Schema<ModelConfig>()
                                 .field("path", &ModelConfig::path)
                                 .required()
                                 .path()
                                 .doc("Hugging Face or timm directory (config.json + safetensors) of the model to fit")
                                 .field("image_size", &ModelConfig::image_size)
                                 .min(0)
                                 .max(8192)
                                 .unit("pixels")
                                 .doc(
                                     "Height and width at which a vision transformer is run: images are scaled to it, "
                                     "positions interpolated; a multiple of its patch size. 0 = its own size, which "
                                     "the images must then have");
  return schema;
}

const core::Schema<TaskConfig>& task_schema() {
  using C = TaskConfig;
  static const auto schema = core::Schema<C>()
                                 .field("name", &C::name)
                                 .required()
                                 .doc("Name of the task")
                                 .field("path", &C::path)
                                 .required()
                                 .path()
                                 .doc("Prepared HDF5 file; what it holds decides the objective (docs/finetune.md)")
                                 .field("packing", &C::packing)
                                 .doc("Completions: short examples share a row of seq_len tokens, none sees another")
                                 .field("mean", &C::mean)
                                 .doc("Images: (pixel / 255 - mean) / deviation")
                                 .field("deviation", &C::deviation)
                                 .above(0)
                                 .doc("Images: see mean")
                                 .field("validation_share", &C::validation_share)
                                 .min(0)
                                 .max(0.9)
                                 .doc("Images: share of the training images that is kept for validation");
  return schema;
}

const core::Schema<EntryConfig>& entry_schema() {
  using C = EntryConfig;
  static const auto schema =
      core::Schema<C>()
          .field("name", &C::name)
          .required()
          .changes_nothing()
          .doc("Name of this way to fit the model, in tables and files")
          .optional_object("adapter", &C::adapter, adapters::adapter_schema())
          .doc("What is trained beside the frozen model; left out, without start and head_only: all its weights")
          .optional_object("galore", &C::galore, galore::galore_schema())
          .joined_later()
          .doc("Of all weights: the optimiser's moments lie in subspaces of the gradients")
          .field("start", &C::start)
          .path()
          .doc("PEFT directory of an adapter to train further, instead of a fresh one")
          .field("head_only", &C::head_only)
          .doc("Train the task's head alone (linear probe)")
          .field("learning_rate", &C::learning_rate)
          .above(0)
          .doc("Instead of train.learning_rate")
          .field("optimizer", &C::optimizer)
          .joined_later()
          .choices(optimizer_names())
          .doc("Instead of train.optimizer")
          .check([](const C& c) -> Violation {
            if (c.adapter.has_value() + !c.start.empty() + c.head_only <= 1) return std::nullopt;
            return fmt::format(
                "'{}': one of adapter, start and head_only: an adapter that is trained further keeps its "
                "configuration",
                c.name);
          })
          .check([](const C& c) -> Violation {
            if (!c.galore || (!c.adapter && c.start.empty() && !c.head_only)) return std::nullopt;
            return fmt::format("'{}': galore is a way to train all weights: leave adapter, start and head_only out",
                               c.name);
          });
  return schema;
}

const core::Schema<EvaluationConfig>& evaluation_schema() {
  using C = EvaluationConfig;
  static const auto schema =
      core::Schema<C>()
          .field("sequences", &C::sequences)
          .evaluation_only()
          .min(0)
          .doc("Evaluated sequences, examples, questions or images per task; 0 = all")
          .field("batch_size", &C::batch_size)
          .evaluation_only()
          .min(1)
          .doc("Rows per forward pass")
          .field("split", &C::split)
          .evaluation_only()
          .choices({"test", "validation"})
          .doc("Which held-out data the tables are about; use validation while choosing settings")
          .field("every_task", &C::every_task)
          .evaluation_only()
          .doc("Score every result on every task, not only on the one it was trained on")
          .field("ranks", &C::ranks)
          .evaluation_only()
          .min(1)
          .unique()
          .doc(
              "Score adapters whose first ranks work alone (dylora, matryoshka; lora as a control) at these ranks, "
              "too");
  return schema;
}

template <typename Item>
Violation names_problem(const char* what, const std::vector<Item>& items) {
  if (items.empty()) return fmt::format("{} must not be empty", what);
  std::set<std::string> names;
  for (const auto& item : items) {
    if (!names.insert(item.name).second) return fmt::format("{}: '{}' stands twice", what, item.name);
    if (item.name == "base" || item.name.empty() || item.name.find('/') != std::string::npos)
      return fmt::format("{}: '{}' is no name: a word without '/', and not 'base'", what, item.name);
  }
  return std::nullopt;
}

}  // namespace

const core::Schema<FinetuneConfig>& finetune_schema() {
  using C = FinetuneConfig;
  static const auto schema = [] {
    core::Schema<C> s;
    add_run_fields(s);
    s.object("model", &C::model, model_schema())
        .doc("The model to fit")
        .list("tasks", &C::tasks, task_schema())
        .doc("What it is fitted to, each by itself")
        .list("adapters", &C::adapters, entry_schema())
        .doc("How; every one with every task and seed")
        .field("seeds", &C::seeds)
        .min(0)
        .unique()
        .doc("Seeds of start values and data order, one result each; empty = the run's seed")
        .field("seq_len", &C::seq_len)
        .min(2)
        .unit("tokens")
        .doc("Context of training and evaluation; the longest completion with its prompt")
        .field("tokenizer", &C::tokenizer)
        .doc("Tokeniser the data must have been prepared with; empty = any that fits the model's own")
        .field("label_smoothing", &C::label_smoothing)
        .min(0)
        .max(0.9)
        .doc("Share of every target that training spreads over all classes or tokens")
        .field("gradient_checkpointing", &C::gradient_checkpointing)
        .changes_nothing()
        .doc("Keep the input of every layer alone and compute it again for gradients: less memory, a third more time")
        .field("update_in_backward", &C::update_in_backward)
        .changes_nothing()
        .doc(
            "Update every parameter as soon as its gradient is there and free it: saves the memory of all gradients "
            "where all weights are trained; needs train.clip_norm 0, whole batches and group_size 1")
        .object("train", &C::train, train_schema())
        .doc("Training of one result")
        .optional_object("early_stopping", &C::early_stopping, early_stopping_schema())
        .joined_later()
        .doc("Train no longer than scores on validation data improve; left out: all of train.steps")
        .object("evaluation", &C::evaluation, evaluation_schema())
        .doc("What is measured")
        .check([](const C& c) { return names_problem("tasks", c.tasks); })
        .check([](const C& c) { return names_problem("adapters", c.adapters); })
        .check([](const C& c) -> Violation {
          const bool whole = c.train.micro_batch_size == 0 || c.train.micro_batch_size == c.train.batch_size;
          if (!c.update_in_backward || (whole && c.train.clip_norm == 0 && c.workers.group_size == 1))
            return std::nullopt;
          return "update_in_backward needs train.clip_norm: 0 (a norm of all gradients is known too late), no "
                 "micro_batch_size and workers.group_size: 1";
        })
        .check([](const C& c) -> Violation {
          if (!c.early_stopping || c.early_stopping->every <= c.train.steps) return std::nullopt;
          return fmt::format("early_stopping.every {} is larger than train.steps {}", c.early_stopping->every,
                             c.train.steps);
        });
    return s;
  }();
  return schema;
}

}  // namespace moraine::algorithms::finetune
