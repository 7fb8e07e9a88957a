#include "algorithms/continual/examples.h"

#include <algorithm>

#include "algorithms/image_source.h"
#include "algorithms/objectives/examples.h"
#include "core/error.h"
#include "core/hash.h"
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
  std::vector<int64_t> classes_of_files() const override { return {source_.dataset().info().num_classes()}; }
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
  struct File {
    data::ExampleDataset train, test;
    std::string path;
  };
  Texts(std::vector<File> files, at::Device device) : files_(std::move(files)), device_(device) {
    int64_t tokens = 0;
    set_.noun = "text";
    for (const File& file : files_) {
      const data::ExampleSetInfo& info = file.train.info();
      const auto first = static_cast<int64_t>(set_.class_names.size());
      const bool several = files_.size() > 1;
      for (const auto& name : info.class_names) set_.class_names.push_back(several ? info.name + "/" + name : name);
      for (const int64_t label : file.train.labels()) set_.train.push_back(first + label);
      for (const int64_t label : file.test.labels()) set_.test.push_back(first + label);
      set_.fingerprint += info.fingerprint;
      set_.path += (set_.path.empty() ? "" : ", ") + file.path;
      for (int64_t row = 0; row < file.train.size(); ++row) tokens += file.train.length(row);
    }
    if (files_.size() > 1) set_.fingerprint = core::sha256(set_.fingerprint);
    tokens_ = std::max<int64_t>(1, tokens / static_cast<int64_t>(set_.train.size()));
  }
  models::Input batch(const std::string& split, std::span<const int64_t> rows) const override {
    std::vector<data::Example> examples;
    for (const int64_t row : rows) {
      const auto [file, place] = find(split, row);
      examples.push_back(file->at(place));
    }
    return objectives::texts(examples, device_);
  }
  std::vector<int64_t> labels(const std::string& split, std::span<const int64_t> rows) const override {
    const auto& all = split == "train" ? set_.train : set_.test;
    std::vector<int64_t> out;
    for (const int64_t row : rows) out.push_back(all[static_cast<size_t>(row)]);
    return out;
  }
  const data::LabelledSet& set() const override { return set_; }
  std::vector<int64_t> classes_of_files() const override {
    std::vector<int64_t> classes;
    for (const File& file : files_) classes.push_back(static_cast<int64_t>(file.train.info().class_names.size()));
    return classes;
  }
  at::Device device() const override { return device_; }
  int64_t tokens_per_example() const override { return tokens_; }
  int64_t stored_bytes(std::span<const int64_t> rows) const override {
    int64_t bytes = 0;
    for (const int64_t row : rows) {
      const auto [file, place] = find("train", row);
      bytes += file->length(place) * (file->info().vocab_size > 65536 ? 4 : 2);  // as prepared files hold them
    }
    return bytes;
  }

 private:
  // The file's split that holds a row of all, and the row's place in it.
  std::pair<const data::ExampleDataset*, int64_t> find(const std::string& split, int64_t row) const {
    for (const File& file : files_) {
      const data::ExampleDataset& own = split == "train" ? file.train : file.test;
      if (row < own.size()) return {&own, row};
      row -= own.size();
    }
    throw core::InternalError(fmt::format("a row {} behind the last text of split {}", row, split));
  }

  std::vector<File> files_;
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

std::shared_ptr<const ExampleSource> open_texts(const std::vector<std::string>& paths, const models::ModelFacts& model,
                                                const std::string& model_directory, at::Device device) {
  if (model.vocab_size == 0)
    throw core::UserError(fmt::format("algorithms/continual: the model is a {}, which reads no text", model.family),
                          "give the stream images, or an encoder or a decoder at model.path");
  std::vector<Texts::File> files;
  for (const std::string& path : paths) {
    files.push_back({data::ExampleDataset::open(path, "train"), data::ExampleDataset::open(path, "test"), path});
    for (const auto* dataset : {&files.back().train, &files.back().test})
      require_fit(*dataset, path, model, model_directory);
  }
  return std::make_shared<Texts>(std::move(files), device);
}

}  // namespace moraine::algorithms::continual
