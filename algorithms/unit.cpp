#include "algorithms/unit.h"

#include "core/error.h"
#include "core/hash.h"

namespace moraine::algorithms {

std::string Unit::id() const {
  // Plans ask for it thousands of times: the object's canonical text, written without copying the spec into one.
  return core::sha256(R"({"inputs":)" + core::Json(inputs).dump() + R"(,"kind":)" + core::Json(kind).dump() +
                      R"(,"spec":)" + spec.dump() + "}");
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
  std::string id = unit.id();
  std::optional<std::string> artefact = state_.result(id);
  if (!seen_.insert(id).second) return artefact;
  if (artefact && !state_.keeps_finished_specs()) {
    unit.spec = nullptr;
    unit.inputs = {};
  }
  (artefact ? plan_.finished : plan_.pending).push_back(std::move(unit));
  (artefact ? plan_.finished_ids : plan_.pending_ids).push_back(std::move(id));
  return artefact;
}

}  // namespace moraine::algorithms
