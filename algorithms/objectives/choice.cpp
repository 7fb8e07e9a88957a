// The right one of several completions: trained as a completion, chosen by the smallest loss per byte.
#include <algorithm>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>

#include "algorithms/objectives/completion.h"
#include "algorithms/objectives/labelled.h"
#include "core/error.h"

namespace moraine::algorithms::objectives {
namespace {

std::vector<int64_t> right_ones(const data::ExampleDataset& dataset) {
  const std::vector<int64_t> labels = dataset.labels();
  std::vector<int64_t> rows;
  for (size_t row = 0; row < labels.size(); ++row)
    if (labels[row] == 1) rows.push_back(static_cast<int64_t>(row));
  return rows;
}

/// Nats per byte decide, as in "acc_norm" of lm-evaluation-harness: longer answers are not worse for being longer.
class Choice final : public Objective {
 public:
  Choice(data::ExampleDataset dataset, const TaskOptions& options)
      : dataset_(dataset), loss_(dataset, right_ones(dataset), options) {}

  TrainJob::MicroLoss loss(models::Backbone& model, const Head&, const Rows& rows) const override {
    return loss_.loss(model, rows);
  }

  /// Rows are questions, a target each; nats and bytes are of the right answers.
  Evaluation score(models::Backbone& model, const Head&, const ScoredRows& rows, int64_t batch_size,
                   WorkerContext& context) const override {
    const at::NoGradGuard no_grad;
    const auto [begin, end] = rows.of(dataset_.groups());
    Evaluation out;
    for (int64_t question = begin; question < end; ++question) {
      ask(model, question, batch_size, out);
      context.progress(static_cast<double>(question + 1 - begin), static_cast<double>(end - begin));
    }
    require_finite(out, dataset_.info().name);
    return out;
  }

  int64_t tokens_per_row() const override { return loss_.tokens_per_row(); }

  const std::string& fingerprint() const override { return dataset_.info().fingerprint; }

 private:
  void ask(models::Backbone& model, int64_t question, int64_t batch_size, Evaluation& out) const {
    const auto [begin, end] = dataset_.group(question);
    double lowest = 0;
    bool right = false;
    for (int64_t first = begin; first < end; first += batch_size) {
      std::vector<data::Example> choices;
      for (int64_t row = first; row < std::min(end, first + batch_size); ++row) choices.push_back(dataset_.at(row));
      const at::Tensor nats = completion_nats(model, choices).rows.to(at::kDouble).cpu();
      for (size_t i = 0; i < choices.size(); ++i) {
        const double own = nats.const_data_ptr<double>()[i];
        const double per_byte = own / static_cast<double>(std::max<int64_t>(1, choices[i].bytes));
        if ((first == begin && i == 0) || per_byte < lowest) lowest = per_byte, right = choices[i].label == 1;
        if (choices[i].label == 1) out.nats += own, out.bytes += choices[i].bytes;
      }
    }
    ++out.tokens;
    out.correct += right;
  }

  data::ExampleDataset dataset_;
  CompletionLoss loss_;
};

}  // namespace

std::shared_ptr<const Objective> choice_objective(const std::filesystem::path& path, const DataSpec& spec) {
  return std::make_shared<Choice>(open_completions(path, spec), spec.options);
}

}  // namespace moraine::algorithms::objectives
