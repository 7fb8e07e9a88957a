#include "algorithms/continual/examples.h"

#include <algorithm>

#include "algorithms/image_source.h"
#include "algorithms/objectives/examples.h"
#include "core/error.h"
#include "data/example_dataset.h"
#include "data/model_tokenizer.h"

namespace moraine::algorithms::continual {
namespace {

class Images final : public ExampleSource {
 public:
  Images(ImageSource source, int64_t tokens) : source_(std::move(source)), tokens_(tokens) {
    const data::ImageDataset& dataset = source_.dataset();
    const data::ImageSetInfo& info = dataset.info();
    set_ = {info.fingerprint,       info.class_names,        dataset.labels("train"),
            dataset.labels("test"), dataset.path().string(), "image"};
  }
  models::Input batch(const std::string& split, std::span<const int64_t> rows) const override {
    return {.images = source_.batch(split, rows)};
  }
  std::vector<int64_t> labels(const std::string& split, std::span<const int64_t> rows) const override {
    return source_.labels(split, rows);
  }
  const data::LabelledSet& set() const override { return set_; }
  at::Device device() const override { return source_.device(); }
  int64_t tokens_per_example() const override { return tokens_; }
  int64_t stored_bytes(std::span<const int64_t> rows) const override {
    return static_cast<int64_t>(rows.size()) * source_.dataset().info().pixels();
  }

 private:
  ImageSource source_;
  data::LabelledSet set_;
  int64_t tokens_;
};

class Texts final : public ExampleSource {
 public:
  Texts(data::ExampleDataset train, data::ExampleDataset test, const std::string& path, at::Device device)
      : train_(std::move(train)), test_(std::move(test)), device_(device) {
    const data::ExampleSetInfo& info = train_.info();
    set_ = {info.fingerprint, info.class_names, train_.labels(), test_.labels(), path, "text"};
    int64_t tokens = 0;
    for (int64_t row = 0; row < train_.size(); ++row) tokens += train_.length(row);
    tokens_ = std::max<int64_t>(1, tokens / train_.size());
  }
  models::Input batch(const std::string& split, std::span<const int64_t> rows) const override {
    std::vector<data::Example> examples;
    for (const int64_t row : rows) examples.push_back(of(split).at(row));
    return objectives::texts(examples, device_);
  }
  std::vector<int64_t> labels(const std::string& split, std::span<const int64_t> rows) const override {
    const auto& all = split == "train" ? set_.train : set_.test;
    std::vector<int64_t> out;
    for (const int64_t row : rows) out.push_back(all[static_cast<size_t>(row)]);
    return out;
  }
  const data::LabelledSet& set() const override { return set_; }
  at::Device device() const override { return device_; }
  int64_t tokens_per_example() const override { return tokens_; }
  int64_t stored_bytes(std::span<const int64_t> rows) const override {
    int64_t tokens = 0;
    for (const int64_t row : rows) tokens += train_.length(row);
    return tokens * static_cast<int64_t>(sizeof(int32_t));
  }

 private:
  const data::ExampleDataset& of(const std::string& split) const { return split == "train" ? train_ : test_; }

  data::ExampleDataset train_, test_;
  data::LabelledSet set_;
  at::Device device_;
  int64_t tokens_ = 0;
};

void require_fit(const data::ExampleDataset& dataset, const std::string& path, const models::ModelFacts& model,
                 const std::string& model_directory) {
  const data::ExampleSetInfo& info = dataset.info();
  if (info.task != "classification")
    throw core::UserError(fmt::format("algorithms/continual: the examples of {} are for {}", path, info.task),
                          "a stream needs classes: scripts/prepare_examples.py classification");
  data::check_model_tokenizer({info.name, info.tokenizer, info.vocab_size, info.fingerprint}, path, model_directory,
                              model.vocab_size);
  objectives::require_lengths(dataset, model.max_tokens, path);
}

}  // namespace

const core::Schema<ImagesConfig>& images_schema() {
  using C = ImagesConfig;
  static const auto schema = core::Schema<C>()
                                 .field("path", &C::path)
                                 .required()
                                 .path()
                                 .doc("Prepared HDF5 file (scripts/fetch_images, scripts/prepare_images.py)")
                                 .field("mean", &C::mean)
                                 .doc("Subtracted from pixels in [0, 1]")
                                 .field("deviation", &C::deviation)
                                 .above(0)
                                 .doc("Pixels are divided by it");
  return schema;
}

const core::Schema<TextsConfig>& texts_schema() {
  static const auto schema = core::Schema<TextsConfig>()
                                 .field("path", &TextsConfig::path)
                                 .required()
                                 .path()
                                 .doc(
                                     "Prepared HDF5 file of texts with classes (scripts/fetch_tasks, "
                                     "scripts/prepare_examples.py classification), in the model's tokens");
  return schema;
}

const core::Schema<ImagesSpec>& ImagesSpec::schema() {
  using C = ImagesSpec;
  static const auto schema =
      core::Schema<C>().field("fingerprint", &C::fingerprint).field("mean", &C::mean).field("deviation", &C::deviation);
  return schema;
}

const core::Schema<TextsSpec>& TextsSpec::schema() {
  static const auto schema = core::Schema<TextsSpec>().field("fingerprint", &TextsSpec::fingerprint);
  return schema;
}

std::shared_ptr<const ExampleSource> open_images(const ImagesConfig& images, const models::ModelFacts& model,
                                                 at::Device device) {
  if (model.image_size == 0)
    throw core::UserError(fmt::format("algorithms/continual: the model is a {}, which reads no images", model.family),
                          "give the stream texts, or a vision transformer at model.path");
  return std::make_shared<Images>(ImageSource(data::ImageDataset::open(images.path), images.mean, images.deviation,
                                              model.channels, model.image_size, device),
                                  model.image_tokens);
}

std::shared_ptr<const ExampleSource> open_texts(const TextsConfig& texts, const models::ModelFacts& model,
                                                const std::string& model_directory, at::Device device) {
  if (model.vocab_size == 0)
    throw core::UserError(fmt::format("algorithms/continual: the model is a {}, which reads no text", model.family),
                          "give the stream images, or an encoder or a decoder at model.path");
  auto train = data::ExampleDataset::open(texts.path, "train"), test = data::ExampleDataset::open(texts.path, "test");
  for (const auto* dataset : {&train, &test}) require_fit(*dataset, texts.path, model, model_directory);
  return std::make_shared<Texts>(std::move(train), std::move(test), texts.path, device);
}

}  // namespace moraine::algorithms::continual
