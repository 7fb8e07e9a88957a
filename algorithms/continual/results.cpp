// What results of a continual run must look like before they are accepted.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>

#include "algorithms/continual/continual.h"
#include "core/error.h"

namespace moraine::algorithms::continual {
namespace {

void require(bool good, const Unit& unit, const std::string& what) {
  if (!good)
    throw core::UserError(fmt::format("algorithms/continual: the result of {} {}", unit.label, what),
                          "its worker runs another version, or its machine damages data");
}

template <typename T>
bool all_finite(const core::TensorView& view) {
  T value = 0;
  for (size_t at = 0; at + sizeof value <= view.data.size(); at += sizeof value) {
    std::memcpy(&value, view.data.data() + at, sizeof value);
    if (!std::isfinite(value)) return false;
  }
  return true;
}

// Trained numbers are float32, sums that must add exactly float64, places of examples int64.
void check_numbers(const Unit& unit, const core::Artefact& artefact) {
  for (const auto& view : artefact.file().tensors()) {
    const bool single = view.dtype == core::DType::kF32, whole = view.dtype == core::DType::kI64;
    require(single || whole || view.dtype == core::DType::kF64, unit,
            fmt::format("holds '{}', which is of another type", view.name));
    require(whole || (single ? all_finite<float>(view) : all_finite<double>(view)), unit,
            fmt::format("holds values in '{}' that are not finite", view.name));
  }
}

void check_evaluation(const Unit& unit, const core::Artefact& artefact, size_t tasks) {
  const core::Json& cells = artefact.meta().at("result");
  const auto after = unit.spec.at("after").get<int64_t>();
  const size_t expected = unit.spec.at("ahead").get<bool>() ? tasks : static_cast<size_t>(after + 1);
  require(artefact.meta().at("after") == after && cells.size() == expected, unit,
          fmt::format("has {} tasks, not {}", cells.size(), expected));
  for (const auto& cell : cells)
    for (const char* key : {"class_incremental", "task_incremental"}) {
      const auto images = cell.at("images").get<int64_t>();
      const int64_t correct = cell.at(key).is_null() ? 0 : cell.at(key).get<int64_t>();
      require(images > 0 && correct >= 0 && correct <= images, unit,
              fmt::format("counts {} of {} images", correct, images));
    }
}

}  // namespace

void Continual::check_result(const Unit& unit, const core::Artefact& artefact) const {
  static const std::map<std::string, std::string> kinds = {
      {"train_backbone", "backbone"}, {"evaluate", "evaluation"}, {"matrices", "accuracy_matrices"}};
  const auto own = kinds.find(unit.kind);
  const std::string kind = own == kinds.end() ? unit.kind : own->second;
  require(artefact.kind() == kind, unit, fmt::format("is of kind '{}', not '{}'", artefact.kind(), kind));
  try {
    if (kind == "accuracy_matrices") return;
    if (kind == "evaluation") return check_evaluation(unit, artefact, streams_.at(0).tasks.size());
    check_numbers(unit, artefact);
    if (kind == "backbone") return;
    if (const auto problem = find_unit_kind(unit.kind).problem(unit, artefact, model_.width))
      require(false, unit, *problem);
  } catch (const core::Json::exception& error) {
    require(false, unit, fmt::format("has metadata that cannot be read: {}", error.what()));
  }
}

}  // namespace moraine::algorithms::continual
