#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "algorithms/adapters/adapter.h"
#include "algorithms/objectives/head.h"
#include "models/backbone.h"
#include "models/open_backbone.h"

namespace moraine::algorithms {

/// A fitted model's head beside the facts of its backbone, as transformers and PEFT write it. An undefined head is
/// that of a task without classes.
struct HeadOnModel {
  const models::ModelFacts& facts;
  const objectives::Head& head;
  std::vector<std::string> classes = {};  // names by row; empty = LABEL_0, LABEL_1, ...
  std::string what = {};                  // in messages: "finetune: lora/sections/seed1"
};

/// What PEFT keeps of a classifier beside an adapter. Throws UserError if transformers has no model of the family with
/// a classifier.
adapters::PeftClassifier peft_classifier(const HeadOnModel& of);
/// A Hugging Face directory of `model` with its head; what lies beside the weights in `source` ("" = nothing) is copied
/// along. Throws as peft_classifier(), and IoError.
void write_fitted_model(const models::Backbone& model, const HeadOnModel& of, const std::filesystem::path& source,
                        const std::filesystem::path& directory);

}  // namespace moraine::algorithms
