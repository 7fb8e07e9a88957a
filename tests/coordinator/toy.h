#pragma once

#include <stdlib.h>

#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "algorithms/unit.h"
#include "core/artefact.h"
#include "core/error.h"

namespace moraine::coordinator {

/// A directory that goes away with the test.
class TempDirectory {
 public:
  TempDirectory() {
    const std::filesystem::path memory = "/dev/shm";  // hundreds of runs with several syncs each
    const auto parent = std::filesystem::is_directory(memory) ? memory : std::filesystem::temp_directory_path();
    std::string name = (parent / "moraine.XXXXXX").string();
    MORAINE_CHECK(mkdtemp(name.data()) != nullptr, "no temporary directory");
    path_ = name;
  }
  ~TempDirectory() { std::filesystem::remove_all(path_); }
  TempDirectory(const TempDirectory&) = delete;
  TempDirectory& operator=(const TempDirectory&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

/// A worker unit named by one letter or word; `cost` in seconds at the scheduler's assumed speed.
inline algorithms::Unit toy_unit(const std::string& label, double cost_s = 1, std::vector<std::string> inputs = {},
                                 algorithms::Place place = algorithms::Place::kWorker) {
  return {.kind = "toy",
          .label = label,
          .spec = {{"name", label}},
          .inputs = std::move(inputs),
          .place = place,
          .cost = cost_s * 1e9};
}

/// One float per artefact: `value`.
inline core::ArtefactPtr toy_artefact(const std::string& name, float value = 1) {
  const core::TensorView tensor{"value", core::DType::kF32, {1}, std::as_bytes(std::span(&value, 1))};
  return core::Artefact::create("toy", {{"name", name}}, std::span(&tensor, 1));
}

/// Results in memory.
class ToyState final : public algorithms::RunState {
 public:
  std::optional<std::string> result(const std::string& unit_id) const override {
    const auto found = results.find(unit_id);
    return found == results.end() ? std::nullopt : std::optional(found->second);
  }
  core::ArtefactPtr artefact(const std::string& id) const override { return artefacts.at(id); }

  std::map<std::string, std::string> results;
  std::map<std::string, core::ArtefactPtr> artefacts;
};

}  // namespace moraine::coordinator
