// The tokens behind a prompt: cross entropy of these alone.
#include <algorithm>
#include <map>
#include <mutex>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>

#include "algorithms/objectives/completion.h"
#include "algorithms/objectives/labelled.h"
#include "core/error.h"
#include "data/permutation.h"

namespace moraine::algorithms::objectives {

CompletionLoss::CompletionLoss(data::ExampleDataset dataset, std::vector<int64_t> rows, const TaskOptions& options)
    : dataset_(std::move(dataset)), rows_(std::move(rows)), options_(options) {
  for (int64_t row = 0; row < dataset_.size(); ++row)
    lengths_.push_back(dataset_.length(row) - 1);  // the last token is a target alone
}

int64_t CompletionLoss::tokens_per_row() const {
  if (options_.packing) return options_.seq_len;
  int64_t tokens = 0;
  for (const int64_t row : rows_) tokens += lengths_[static_cast<size_t>(row)];
  return std::max<int64_t>(1, tokens / static_cast<int64_t>(rows_.size()));
}

// Rows of an epoch depend on its order alone, so where a step's rows lie follows from the epochs before it.
std::vector<std::vector<int64_t>> CompletionLoss::packed_rows(const Objective::Rows& rows) const {
  const std::lock_guard lock(mutex_);
  if (packed_seed_ != rows.seed) packed_.clear(), packed_seed_ = rows.seed;
  const auto size = static_cast<int64_t>(rows_.size());
  std::vector<std::vector<int64_t>> out;
  int64_t start = 0;  // of an epoch, in rows
  for (int64_t epoch = 0; static_cast<int64_t>(out.size()) < rows.count; ++epoch) {
    if (epoch == static_cast<int64_t>(packed_.size()))
      packed_.push_back(packed(data::batch_of(rows_, rows.seed, epoch * size, size), lengths_, options_.seq_len));
    const auto& own = packed_[static_cast<size_t>(epoch)];
    for (int64_t row = std::max<int64_t>(0, rows.first + static_cast<int64_t>(out.size()) - start);
         row < static_cast<int64_t>(own.size()) && static_cast<int64_t>(out.size()) < rows.count; ++row)
      out.push_back(own[static_cast<size_t>(row)]);
    start += static_cast<int64_t>(own.size());
  }
  return out;
}

TrainJob::MicroLoss CompletionLoss::loss(models::Backbone& model, const Objective::Rows& rows) const {
  std::vector<std::vector<int64_t>> chosen;
  if (options_.packing)
    chosen = packed_rows(rows);
  else
    for (const int64_t row : data::batch_of(rows_, rows.seed, rows.first, rows.count)) chosen.push_back({row});
  std::vector<std::vector<data::Example>> examples;
  for (const auto& row : chosen) {
    examples.emplace_back();
    for (const int64_t example : row) examples.back().push_back(dataset_.at(example));
  }
  const ExampleBatch batch = completions(examples, model.device());
  const models::TokenLoss loss =
      model.token_loss(batch.input, batch.targets, {.few_targets = true, .label_smoothing = options_.label_smoothing});
  return {loss.sum, loss.count};
}

data::ExampleDataset open_completions(const std::filesystem::path& path, const DataSpec& spec) {
  auto dataset = data::ExampleDataset::open(path, spec.split, spec.options.tokenizer);
  require_lengths(dataset, spec.options.seq_len + 1, path.string());
  return dataset;
}

models::TokenLoss completion_nats(models::Backbone& model, const std::vector<data::Example>& examples) {
  std::vector<std::vector<data::Example>> rows;
  for (const auto& example : examples) rows.push_back({example});
  const ExampleBatch batch = completions(rows, model.device());
  return model.token_loss(batch.input, batch.targets, {.correct = true, .rows = true, .few_targets = true});
}

namespace {

class Completion final : public Objective {
 public:
  Completion(data::ExampleDataset dataset, const TaskOptions& options)
      : dataset_(dataset), loss_(dataset, all_rows(dataset.size()), options) {}

  TrainJob::MicroLoss loss(models::Backbone& model, const Head&, const Rows& rows) const override {
    return loss_.loss(model, rows);
  }

  Evaluation score(models::Backbone& model, const Head&, const ScoredRows& rows, int64_t batch_size,
                   WorkerContext& context) const override {
    const at::NoGradGuard no_grad;
    const auto [begin, stop] = rows.of(dataset_.size());
    Evaluation out;
    for (int64_t first = begin; first < stop; first += batch_size) {
      const int64_t end = std::min(stop, first + batch_size);
      std::vector<data::Example> examples;
      for (int64_t row = first; row < end; ++row) {
        examples.push_back(dataset_.at(row));
        out.bytes += examples.back().bytes;
      }
      const models::TokenLoss sums = completion_nats(model, examples);
      out.nats += sums.rows.to(at::kDouble).sum().item<double>();
      out.tokens += sums.count;
      out.correct += sums.correct;
      context.progress(static_cast<double>(end - begin), static_cast<double>(stop - begin));
    }
    require_finite(out, dataset_.info().name);
    return out;
  }

  int64_t tokens_per_row() const override { return loss_.tokens_per_row(); }

  const std::string& fingerprint() const override { return dataset_.info().fingerprint; }

 private:
  data::ExampleDataset dataset_;
  CompletionLoss loss_;
};

}  // namespace

std::shared_ptr<const Objective> completion_objective(const std::filesystem::path& path, const DataSpec& spec) {
  return std::make_shared<Completion>(open_completions(path, spec), spec.options);
}

}  // namespace moraine::algorithms::objectives
