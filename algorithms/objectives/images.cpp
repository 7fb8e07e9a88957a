// The class of an image: cross entropy of a head's logits.
#include <cmath>

#include "algorithms/image_source.h"
#include "algorithms/objectives/labelled.h"
#include "algorithms/objectives/objective.h"
#include "core/error.h"
#include "core/hash.h"
#include "data/permutation.h"

namespace moraine::algorithms::objectives {

// Which images are kept for validation depends on their number and share alone: the same for every run on a file.
ImageRows image_rows(int64_t images, double validation_share) {
  const auto kept = static_cast<int64_t>(std::llround(static_cast<double>(images) * validation_share));
  const data::Permutation order(images, core::derive_seed(0, "objectives/validation"));
  ImageRows rows;
  for (int64_t row = 0; row < images; ++row) (order(row) < kept ? rows.validation : rows.train).push_back(row);
  return rows;
}

namespace {

class Images final : public Objective {
 public:
  Images(ImageSource source, std::string split, std::vector<int64_t> rows, double label_smoothing)
      : source_(std::move(source)),
        split_(std::move(split)),
        rows_(std::move(rows)),
        label_smoothing_(label_smoothing) {}

  TrainJob::MicroLoss loss(models::Backbone& model, const Head& head, const Rows& rows) const override {
    const auto [logits, labels] = logits_of(model, head, data::batch_of(rows_, rows.seed, rows.first, rows.count));
    return {class_loss(logits, labels, label_smoothing_), rows.count};
  }

  Evaluation score(models::Backbone& model, const Head& head, const ScoredRows& rows, int64_t batch_size,
                   WorkerContext& context) const override {
    return score_classes(rows_, rows, batch_size, context, source_.dataset().info().name,
                         [&](const std::vector<int64_t>& batch) { return logits_of(model, head, batch); });
  }

  const std::string& fingerprint() const override { return source_.dataset().info().fingerprint; }

 private:
  Scored logits_of(models::Backbone& model, const Head& head, const std::vector<int64_t>& batch) const {
    const at::Tensor images = source_.batch(split_, batch).to(model.dtype());
    return {head.logits(model.features({.images = images})), source_.labels(split_, batch)};
  }

  ImageSource source_;
  std::string split_;  // of the file
  std::vector<int64_t> rows_;
  double label_smoothing_;
};

}  // namespace

std::shared_ptr<const Objective> images_objective(const std::filesystem::path& path, const DataSpec& spec,
                                                  const models::ModelFacts& model, at::Device device) {
  const TaskOptions& options = spec.options;
  auto dataset = data::ImageDataset::open(path);
  const bool test = spec.split == "test";
  const auto size = static_cast<int64_t>(dataset.labels(test ? "test" : "train").size());
  const ImageRows parts = image_rows(size, test ? 0 : options.validation_share);
  return std::make_shared<Images>(
      ImageSource(std::move(dataset), options.mean, options.deviation, model.channels, model.image_size, device),
      test ? "test" : "train", spec.split == "validation" ? parts.validation : parts.train, options.label_smoothing);
}

}  // namespace moraine::algorithms::objectives
