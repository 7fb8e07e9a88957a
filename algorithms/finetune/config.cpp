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
                                 .doc("Hugging Face directory (config.json + safetensors) of the model to fit");
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
                                 .doc("Prepared HDF5 file (scripts/prepare_text.py)");
  return schema;
}

const core::Schema<EntryConfig>& entry_schema() {
  using C = EntryConfig;
  static const auto schema =
      core::Schema<C>()
          .field("name", &C::name)
          .required()
          .doc("Name of this way to fit the model, in tables and files")
          .optional_object("adapter", &C::adapter, adapters::adapter_schema())
          .doc("What is trained beside the frozen model; left out, without `start`: all its weights")
          .optional_object("galore", &C::galore, galore::galore_schema())
          .joined_later()
          .doc("Of all weights: the optimiser's moments lie in subspaces of the gradients")
          .field("start", &C::start)
          .path()
          .doc("PEFT directory of an adapter to train further, instead of a fresh one")
          .field("learning_rate", &C::learning_rate)
          .above(0)
          .doc("Instead of train.learning_rate")
          .field("optimizer", &C::optimizer)
          .joined_later()
          .choices({"adamw", "adamw8bit", "sgd"})
          .doc("Instead of train.optimizer")
          .check([](const C& c) -> Violation {
            if (!c.adapter || c.start.empty()) return std::nullopt;
            return fmt::format(
                "'{}': adapter or start: an adapter that is trained further "
                "keeps its configuration",
                c.name);
          })
          .check([](const C& c) -> Violation {
            if (!c.galore || (!c.adapter && c.start.empty())) return std::nullopt;
            return fmt::format("'{}': galore is a way to train all weights: leave adapter and start out", c.name);
          });
  return schema;
}

const core::Schema<EvaluationConfig>& evaluation_schema() {
  using C = EvaluationConfig;
  static const auto schema = core::Schema<C>()
                                 .field("sequences", &C::sequences)
                                 .evaluation_only()
                                 .min(0)
                                 .doc("Evaluated sequences per task; 0 = all")
                                 .field("batch_size", &C::batch_size)
                                 .evaluation_only()
                                 .min(1)
                                 .doc("Sequences per forward pass")
                                 .field("split", &C::split)
                                 .evaluation_only()
                                 .choices({"test", "validation"})
                                 .doc("Which documents the tables are about; use validation while choosing settings")
                                 .field("every_task", &C::every_task)
                                 .evaluation_only()
                                 .doc("Score every result on every task, not only on the one it was trained on");
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
        .doc("Context of training and evaluation")
        .field("tokenizer", &C::tokenizer)
        .doc("Tokeniser the data must have been prepared with")
        .object("train", &C::train, train_schema())
        .doc("Training of one result")
        .object("evaluation", &C::evaluation, evaluation_schema())
        .doc("What is measured")
        .check([](const C& c) { return names_problem("tasks", c.tasks); })
        .check([](const C& c) { return names_problem("adapters", c.adapters); });
    return s;
  }();
  return schema;
}

}  // namespace moraine::algorithms::finetune
