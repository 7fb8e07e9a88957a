#include "algorithms/unit.h"

#include <algorithm>

#include "core/error.h"
#include "core/hash.h"

namespace moraine::algorithms {

std::string Unit::id() const {
  return core::sha256(core::Json{{"kind", kind}, {"spec", spec}, {"inputs", inputs}}.dump());
}

core::Json Unit::to_json() const {
  return {{"kind", kind},     {"label", label}, {"spec", spec},
          {"inputs", inputs}, {"cost", cost},   {"place", place == Place::kWorker ? "worker" : "coordinator"}};
}

Unit Unit::from_json(const core::Json& json) {
  try {
    const std::string place = json.at("place");
    if (place != "worker" && place != "coordinator") {
      throw core::UserError("unit: place must be worker or coordinator: " + place);
    }
    return {.kind = json.at("kind"),
            .label = json.at("label"),
            .spec = json.at("spec"),
            .inputs = json.at("inputs"),
            .place = place == "worker" ? Place::kWorker : Place::kCoordinator,
            .cost = json.at("cost")};
  } catch (const core::Json::exception& error) {
    throw core::UserError(fmt::format("unit: malformed: {}", error.what()));
  }
}

std::optional<std::string> PlanBuilder::need(Unit unit) {
  const std::string id = unit.id();
  std::optional<std::string> artefact = state_.result(id);
  if (std::find(seen_.begin(), seen_.end(), id) == seen_.end()) {
    seen_.push_back(id);
    (artefact ? plan_.finished : plan_.pending).push_back(std::move(unit));
  }
  return artefact;
}

}  // namespace moraine::algorithms
