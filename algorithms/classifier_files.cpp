#include "algorithms/classifier_files.h"

#include <algorithm>
#include <utility>

#include "algorithms/language_model.h"
#include "core/error.h"
#include "models/checkpoint.h"

namespace moraine::algorithms {
namespace {

const models::ClassifierForm& form_of(const HeadOnModel& of) {
  if (of.facts.classifier.architecture.empty())
    throw core::UserError(
        fmt::format("algorithms/{} has a head, and transformers has no model of type {} with a classifier", of.what,
                    of.facts.config.at("model_type").get<std::string>()),
        "`moraine cp` takes the artefact as it is");
  return of.facts.classifier;
}

}  // namespace

adapters::PeftClassifier peft_classifier(const HeadOnModel& of) {
  adapters::PeftClassifier classifier;
  if (!of.head.weight.defined()) return classifier;
  const models::ClassifierForm& form = form_of(of);
  for (const auto& [name, tensor] : of.head.tensors())
    classifier.tensors.emplace_back(form.module + name.substr(name.find('.')), tensor);
  classifier.module = form.module;
  classifier.prefix = form.prefix;
  classifier.task_type = of.facts.vocab_size > 0 ? "SEQ_CLS" : "";
  return classifier;
}

void write_fitted_model(const models::Backbone& model, const HeadOnModel& of, const std::filesystem::path& source,
                        const std::filesystem::path& directory) {
  models::NamedTensors weights(model.weights().begin(), model.weights().end());
  core::Json config = of.facts.config;
  if (of.head.weight.defined()) {
    const models::ClassifierForm& form = form_of(of);
    std::erase_if(weights, [](const auto& entry) { return entry.first == "lm_head.weight"; });
    for (auto& [name, tensor] : weights) name.insert(0, form.prefix);
    for (const auto& [name, tensor] : of.head.tensors())
      weights.emplace_back(form.module + name.substr(name.find('.')), tensor.to(model.dtype()));
    std::ranges::sort(weights, {}, &std::pair<std::string, at::Tensor>::first);
    config["architectures"] = {form.architecture};
    for (int64_t row = 0; row < of.head.weight.size(0); ++row) {
      const std::string name =
          of.classes.empty() ? fmt::format("LABEL_{}", row) : of.classes.at(static_cast<size_t>(row));
      config["id2label"][std::to_string(row)] = name;
      config["label2id"][name] = row;
    }
  }
  write_model_directory(directory, config, std::move(weights));
  if (!source.empty()) models::copy_companions(source, directory);
}

}  // namespace moraine::algorithms
