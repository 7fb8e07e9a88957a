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

PlanBuilder::PlanBuilder(const RunState& state) : state_(state), memory_(state.memory()) {
  if (memory_ != nullptr) ++memory_->plans;
}

std::optional<std::string> PlanBuilder::need(Unit unit) {
  std::string id = unit.id();
  return need(std::move(unit), std::move(id));
}

std::optional<std::string> PlanBuilder::need(Unit unit, std::string id) {
  std::optional<std::string> artefact = state_.result(id);
  if (!seen_.insert(id).second) return artefact;
  if (artefact) plan_.finished_cost[unit.kind] += unit.cost;
  if (artefact && !state_.keeps_finished_specs()) {
    unit.spec = nullptr;
    unit.inputs = {};
  }
  (artefact ? plan_.finished : plan_.pending).push_back(std::move(unit));
  (artefact ? plan_.finished_ids : plan_.pending_ids).push_back(std::move(id));
  return artefact;
}

std::optional<std::string> PlanBuilder::need(const std::string& label, const std::function<Unit()>& make) {
  if (memory_ == nullptr) return need(make());
  if (const auto known = memory_->units.find(label); known != memory_->units.end()) {
    PlanMemory::Finished& unit = known->second;
    if (unit.plan != memory_->plans) plan_.finished_cost[unit.kind] += unit.cost;
    unit.plan = memory_->plans;
    return unit.artefact;
  }
  Unit unit = make();
  MORAINE_CHECK_EQ(unit.label, label);
  const std::string id = unit.id();
  const auto [named, added] = labels_.try_emplace(label, id);
  MORAINE_CHECK(named->second == id, "plan: two units are called {}", label);
  // A unit that two labels name counts once.
  const double cost = seen_.contains(id) ? 0 : unit.cost;
  const std::string kind = unit.kind;
  auto artefact = need(std::move(unit), id);
  if (artefact && added) found_.emplace_back(label, PlanMemory::Finished{*artefact, kind, cost, 0});
  return artefact;
}

Plan PlanBuilder::finish() {
  for (auto& [label, unit] : found_) memory_->units.emplace(label, std::move(unit));
  found_.clear();
  return std::move(plan_);
}

}  // namespace moraine::algorithms
