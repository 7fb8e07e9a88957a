#pragma once

#include <atomic>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "algorithms/language_model.h"
#include "algorithms/register.h"
#include "core/error.h"
#include "core/hdf5.h"
#include "data/fingerprint.h"
#include "models/bert.h"
#include "tests/algorithms/tiny_run.h"
#include "tests/temporary_directory.h"
#include "worker/context.h"

namespace moraine::algorithms {

/// Runs continual recipes on tiny images and texts, unit by unit in this thread.
class ContinualWorld : public testing::Test, public RunState {
 protected:
  ContinualWorld() {
    write_image_file(folder_ / "images.h5", 6, 97);
    write_image_file(folder_ / "others.h5", 3, 98);
  }

  // Texts of 4 to 7 bytes, one of which tells the class; 14 for training and 5 for tests each.
  void write_texts(const std::string& name, int64_t classes, uint32_t state) {
    core::Hdf5File file(folder_ / name, core::Hdf5File::Mode::kCreate);
    for (const auto& [split, each] : {std::pair{"train", 14}, std::pair{"test", 5}}) {
      std::vector<uint16_t> tokens;
      std::vector<int64_t> starts = {0}, labels, lengths;
      for (int64_t row = 0; row < each * classes; ++row) {
        labels.push_back(row % classes);
        lengths.push_back(4 + row % 4);
        for (int64_t place = 0; place < lengths.back(); ++place) {
          state = state * 1664525 + 1013904223;
          tokens.push_back(static_cast<uint16_t>(place == 1 ? 'A' + labels.back() : 'a' + (state >> 24) % 20));
        }
        starts.push_back(static_cast<int64_t>(tokens.size()));
      }
      const auto count = static_cast<int64_t>(labels.size());
      const std::string at = std::string(split) + "/";
      file.write<uint16_t>(at + "tokens", tokens, {static_cast<int64_t>(tokens.size())});
      file.write<int64_t>(at + "examples", starts, {count + 1});
      file.write<int64_t>(at + "prompts", lengths, {count});
      file.write<int64_t>(at + "labels", labels, {count});
      file.write<int64_t>(at + "bytes", std::vector<int64_t>(labels.size(), 0), {count});
    }
    core::Json names = core::Json::array();
    for (int64_t label = 0; label < classes; ++label) names.push_back("c" + std::to_string(label));
    file.set_attribute("format", "moraine-text-examples");
    file.set_attribute("format_version", 1);
    file.set_attribute("name", "tiny");
    file.set_attribute("task", "classification");
    file.set_attribute("class_names", names.dump());
    file.set_attribute("tokenizer", "bytes-v1");
    file.set_attribute("vocab_size", 257);
    file.set_attribute("end_of_document", 256);
    file.set_attribute("fingerprint", data::examples_fingerprint(file));
    file.close();
  }
  // A BERT of one layer with random weights.
  void write_bert(const std::string& name) {
    models::BertConfig config;
    config.vocab_size = 257, config.hidden_size = 8, config.intermediate_size = 12, config.num_layers = 1;
    config.num_heads = 2, config.max_position_embeddings = 16;
    const auto bert = models::Bert::from_config(config, 1, at::kFloat);
    write_model_directory(folder_ / name, bert.config().to_json(), {bert.weights().begin(), bert.weights().end()});
  }

  std::optional<std::string> result(const std::string& unit) const override {
    const auto it = results_.find(unit);
    return it == results_.end() ? std::nullopt : std::optional(it->second->id());
  }
  core::ArtefactPtr artefact(const std::string& id) const override { return artefacts_.at(id); }

  core::ArtefactPtr execute(const Method& by, const Unit& unit) {
    static const std::atomic<int> no_signals{0};
    worker::WorkerOptions options;
    worker::DirectContext context(unit, 1, options, no_signals,
                                  {.artefact = [&](const std::string& id) { return artefacts_.at(id); },
                                   .metric = [](const core::metrics::Record&) {},
                                   .progress = [](double, double) {}});
    return by.execute(unit, context);
  }

  // Runs everything and returns the finished units by label.
  std::map<std::string, Unit> run(const std::vector<std::string>& overrides = {}) {
    results_.clear();
    recipe_ = load_recipe(folder_ / "recipe.yaml", overrides);
    recipe_.method->open_inputs();
    for (Plan plan = recipe_.method->plan(*this); !plan.pending.empty(); plan = recipe_.method->plan(*this))
      for (const auto& unit : plan.pending) {
        results_[unit.id()] = execute(*recipe_.method, unit);
        artefacts_[results_[unit.id()]->id()] = results_[unit.id()];
        EXPECT_NO_THROW(recipe_.method->check_result(unit, *results_[unit.id()])) << unit.label;
      }
    EXPECT_EQ(recipe_.method->missing_result(*this), std::nullopt);
    std::map<std::string, Unit> units;
    for (const auto& unit : recipe_.method->plan(*this).finished) units[unit.label] = unit;
    return units;
  }
  core::Json tested(const std::map<std::string, Unit>& units, const std::string& label) const {
    return results_.at(units.at(label).id())->meta().at("result");
  }
  std::string refusal(const std::vector<std::string>& overrides) {
    try {
      load_recipe(folder_ / "recipe.yaml", overrides).method->open_inputs();
    } catch (const core::UserError& error) {
      return error.what();
    }
    return "accepted";
  }

  TemporaryDirectory folder_;
  ParsedRecipe recipe_;
  std::map<std::string, core::ArtefactPtr> results_, artefacts_;
};

}  // namespace moraine::algorithms
