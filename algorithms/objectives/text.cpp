// Next tokens of documents that follow each other.
#include "algorithms/language_model.h"
#include "algorithms/objectives/objective.h"
#include "data/text_dataset.h"

namespace moraine::algorithms::objectives {
namespace {

class Text final : public Objective {
 public:
  Text(data::TextDataset dataset, double label_smoothing)
      : dataset_(std::move(dataset)), label_smoothing_(label_smoothing) {}

  TrainJob::MicroLoss loss(models::Backbone& model, const Head&, const Rows& rows) const override {
    const at::Tensor sequences = training_rows(dataset_, rows.seed, rows.first, rows.count, model.device());
    const models::TokenLoss loss = next_tokens(model, sequences, {.label_smoothing = label_smoothing_});
    return {loss.sum, loss.count};
  }

  Evaluation score(models::Backbone& model, const Head&, const ScoredRows& rows, int64_t batch_size,
                   WorkerContext& context) const override {
    return evaluate([&](const at::Tensor& batch) { return next_tokens(model, batch, {.correct = true}); }, dataset_,
                    rows, batch_size, context);
  }

  int64_t tokens_per_row() const override { return dataset_.seq_len(); }

  const std::string& fingerprint() const override { return dataset_.info().fingerprint; }

 private:
  // sequences [B, T + 1]; padding is -1.
  static models::TokenLoss next_tokens(models::Backbone& model, const at::Tensor& sequences,
                                       const models::TokenLossOptions& options) {
    return model.token_loss({.tokens = sequences.slice(1, 0, -1).clamp_min(0)}, sequences.slice(1, 1), options);
  }

  data::TextDataset dataset_;
  double label_smoothing_;
};

}  // namespace

std::shared_ptr<const Objective> text_objective(const std::filesystem::path& path, const DataSpec& spec) {
  return std::make_shared<Text>(data::TextDataset::open(path, spec.split, spec.options.seq_len, spec.options.tokenizer),
                                spec.options.label_smoothing);
}

}  // namespace moraine::algorithms::objectives
