#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "algorithms/objectives/examples.h"
#include "algorithms/objectives/objective.h"

namespace moraine::algorithms::objectives {

/// Training on what follows the prompts of some examples, each in a row of its own or several in one. Thread-safe.
class CompletionLoss {
 public:
  CompletionLoss(data::ExampleDataset dataset, std::vector<int64_t> rows, const TaskOptions& options);
  TrainJob::MicroLoss loss(models::Backbone& model, const Objective::Rows& rows) const;
  int64_t tokens_per_row() const;

 private:
  std::vector<std::vector<int64_t>> packed_rows(const Objective::Rows& rows) const;

  data::ExampleDataset dataset_;
  std::vector<int64_t> rows_;     // of the data set, those that are trained on
  std::vector<int64_t> lengths_;  // of all of the data set: what an example's inputs take
  TaskOptions options_;
  mutable std::mutex mutex_;
  mutable uint64_t packed_seed_ = 0;
  mutable std::vector<std::vector<std::vector<int64_t>>> packed_;  // by epoch: examples of each row
};

/// The split that `spec` names; UserError as ExampleDataset::open(), and for examples longer than seq_len.
data::ExampleDataset open_completions(const std::filesystem::path& path, const DataSpec& spec);

/// What is behind the prompts, summed for each example: TokenLoss::rows.
models::TokenLoss completion_nats(models::Backbone& model, const std::vector<data::Example>& examples);

}  // namespace moraine::algorithms::objectives
