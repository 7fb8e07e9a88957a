#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "algorithms/worker_context.h"
#include "core/config.h"
#include "data/task_stream.h"
#include "models/open_backbone.h"

namespace moraine::algorithms::continual {

/// The labelled images of a stream.
struct ImagesConfig {
  std::string path;                    // prepared HDF5 file
  double mean = 0.5, deviation = 0.5;  // of pixels in [0, 1]; a loaded backbone wants what it was trained with
};
const core::Schema<ImagesConfig>& images_schema();

/// The labelled texts of a stream.
struct TextsConfig {
  std::string path;  // prepared HDF5 file of examples with classes
};
const core::Schema<TextsConfig>& texts_schema();

/// Images as units name them: by content.
struct ImagesSpec {
  std::string fingerprint = {};
  double mean = 0.5, deviation = 0.5;
  static const core::Schema<ImagesSpec>& schema();
};
/// Texts as units name them.
struct TextsSpec {
  std::string fingerprint = {};
  static const core::Schema<TextsSpec>& schema();
};

/// Labelled examples as a backbone reads them, in splits "train" and "test". Thread-safe.
class ExampleSource {
 public:
  virtual ~ExampleSource() = default;
  /// Rows of a split on the device, in float32 where they are numbers.
  virtual models::Input batch(const std::string& split, std::span<const int64_t> rows) const = 0;
  /// Labels of the rows, on the host.
  virtual std::vector<int64_t> labels(const std::string& split, std::span<const int64_t> rows) const = 0;
  /// What a stream is cut from.
  virtual const data::LabelledSet& set() const = 0;
  /// Numbers of classes of the files it was opened from.
  virtual std::vector<int64_t> classes_of_files() const = 0;
  virtual at::Device device() const = 0;
  /// Tokens a backbone passes for one training example, in the mean.
  virtual int64_t tokens_per_example() const = 0;
  /// Bytes in which the rows of split "train" are stored: what a buffer of them costs.
  virtual int64_t stored_bytes(std::span<const int64_t> rows) const = 0;
};

/// Prepared images, grey ones repeated over the model's channels, scaled to its size. Throws UserError if they cannot
/// be read, have other channels, or the model reads no images.
std::shared_ptr<const ExampleSource> open_images(const ImagesConfig& images, const models::ModelFacts& model,
                                                 at::Device device);
/// Prepared texts of task "classification", padded to the longest of a batch; the classes of several files stand behind
/// each other, named "<file's name>/<class>". Throws UserError if they cannot be read, have no classes, do not fit the
/// model's positions or vocabulary, or the model reads no text. A tokenizer.json in `model_directory` must be the one
/// they were made with.
std::shared_ptr<const ExampleSource> open_texts(const std::vector<std::string>& paths, const models::ModelFacts& model,
                                                const std::string& model_directory, at::Device device);

}  // namespace moraine::algorithms::continual
