#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/json.h"
#include "models/backbone.h"

namespace moraine::models {

/// How transformers names a model of the family with a linear classifier on its features.
struct ClassifierForm {
  std::string architecture;  // "BertForSequenceClassification"; "" = there is none
  std::string prefix;        // of the backbone's tensors: "bert."
  std::string module;        // the classifier's: "classifier"
  bool bias = true;
};

/// What is known of a model without the values of its weights: what plans and counts need. Recorded with a run.
struct ModelFacts {
  std::string family;            // "decoder" | "encoder" | "vit"
  int64_t width = 0;             // of features()
  int64_t parameters = 0;        // numbers in its weights
  int64_t vocab_size = 0;        // 0 = it reads no text
  int64_t max_tokens = 0;        // positions
  bool predicts_tokens = false;  // token_loss() is there
  int64_t image_size = 0;        // 0 = it reads no images
  int64_t channels = 0;
  int64_t image_tokens = 0;  // of one image, the CLS token included
  ClassifierForm classifier = {};
  std::vector<Slot> slots;
  core::Json config = {};  // config.json, as the family writes it

  core::Json to_json() const;
  /// What to_json() wrote.
  static ModelFacts from_json(const core::Json& json);
};

/// The model of a Hugging Face (or timm) directory, whatever its family, without a classifier of its own. `dtype` as
/// Decoder::from_directory. With an `image_size` a vision transformer takes images of that size (Vit::resized). Throws
/// UserError, for a model_type that no family reads naming those that are read.
std::unique_ptr<Backbone> open_backbone(const std::filesystem::path& directory, std::optional<at::ScalarType> dtype,
                                        std::optional<int64_t> image_size = std::nullopt);

/// The facts of a directory's model. Maps its files, reads no weight but, at another image size, the positions.
ModelFacts model_facts(const std::filesystem::path& directory, std::optional<int64_t> image_size = std::nullopt);

}  // namespace moraine::models
