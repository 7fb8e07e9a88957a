#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "algorithms/method.h"
#include "algorithms/register.h"

namespace moraine::algorithms {

// A recipe's whole run in this thread, and small prepared files for it.

/// A recipe's method and, once run() has been called, everything it made.
class TinyRun : public RunState {
 public:
  /// Throws UserError as load_recipe() and open_inputs().
  TinyRun(const std::filesystem::path& recipe, const std::vector<std::string>& overrides);

  /// Executes the whole plan; every result is checked as a coordinator does.
  void run();
  /// What a worker whose recipe is `method` makes of a unit of the run `state`; it starts with nothing in its cache.
  static core::ArtefactPtr execute(const Method& method, const Unit& unit, const RunState& state);
  void accept(const Unit& unit, const core::ArtefactPtr& artefact);
  void adopt(const TinyRun& other);

  std::optional<std::string> result(const std::string& unit) const override;
  core::ArtefactPtr artefact(const std::string& id) const override { return artefacts_.at(id); }

  const Method& method() const { return *parsed_.method; }
  const core::Json& values() const { return parsed_.values; }
  std::vector<Unit> finished() const { return method().plan(*this).finished; }
  core::ArtefactPtr made_by(const std::string& label) const;
  /// Ids of all artefacts by their unit's label.
  std::map<std::string, std::string> made() const;

 private:
  ParsedRecipe parsed_;
  std::map<std::string, std::string> results_;
  std::map<std::string, core::ArtefactPtr> artefacts_;
};

/// Text of random letters of an alphabet of the name's own, `size` tokens per split.
void write_text_file(const std::filesystem::path& path, const std::string& name, const std::string& tokenizer,
                     int64_t size);
/// Noisy images [1, 4, 4] whose brightest pixel tells the class; 14 training and 5 test images each.
void write_image_file(const std::filesystem::path& path, int64_t classes, uint32_t seed);
/// Texts of two classes of different letters, `examples` per split, of the byte tokeniser.
void write_classification_file(const std::filesystem::path& path, int64_t examples);

}  // namespace moraine::algorithms
