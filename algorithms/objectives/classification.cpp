// The class of a text: cross entropy of a head's logits.
#include <algorithm>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>

#include "algorithms/objectives/examples.h"
#include "algorithms/objectives/labelled.h"
#include "algorithms/objectives/objective.h"
#include "data/permutation.h"

namespace moraine::algorithms::objectives {
namespace {

class Classification final : public Objective {
 public:
  Classification(data::ExampleDataset dataset, double label_smoothing)
      : dataset_(std::move(dataset)), rows_(all_rows(dataset_.size())), label_smoothing_(label_smoothing) {
    for (const int64_t row : rows_) tokens_ += dataset_.length(row);
  }

  TrainJob::MicroLoss loss(models::Backbone& model, const Head& head, const Rows& rows) const override {
    const auto [logits, labels] = logits_of(model, head, data::batch_of(rows_, rows.seed, rows.first, rows.count));
    return {class_loss(logits, labels, label_smoothing_), rows.count};
  }

  Evaluation score(models::Backbone& model, const Head& head, const ScoredRows& rows, int64_t batch_size,
                   WorkerContext& context) const override {
    return score_classes(rows_, rows, batch_size, context, dataset_.info().name,
                         [&](std::vector<int64_t> batch) { return logits_of(model, head, batch); });
  }

  int64_t tokens_per_row() const override { return std::max<int64_t>(1, tokens_ / dataset_.size()); }

  const std::string& fingerprint() const override { return dataset_.info().fingerprint; }

 private:
  Scored logits_of(models::Backbone& model, const Head& head, const std::vector<int64_t>& batch) const {
    std::vector<data::Example> examples;
    std::vector<int64_t> labels;
    for (const int64_t row : batch) {
      examples.push_back(dataset_.at(row));
      labels.push_back(examples.back().label);
    }
    return {head.logits(model.features(texts(examples, model.device()))), labels};
  }

  data::ExampleDataset dataset_;
  std::vector<int64_t> rows_;
  double label_smoothing_;
  int64_t tokens_ = 0;
};

}  // namespace

std::shared_ptr<const Objective> classification_objective(const std::filesystem::path& path, const DataSpec& spec) {
  return std::make_shared<Classification>(data::ExampleDataset::open(path, spec.split, spec.options.tokenizer),
                                          spec.options.label_smoothing);
}

}  // namespace moraine::algorithms::objectives
