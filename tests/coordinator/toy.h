#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "algorithms/unit.h"
#include "core/artefact.h"
#include "tests/temporary_directory.h"

namespace moraine::coordinator {

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
