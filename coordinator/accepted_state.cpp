#include "coordinator/accepted_state.h"

#include "core/error.h"
#include "core/log.h"

namespace moraine::coordinator {

AcceptedState::AcceptedState(const RunLayout& layout, std::span<const Record> records) : store_(layout.artefacts()) {
  for (const Record& record : records) {
    if (record.type == RecordType::kAccept) accept(record.body.at("unit"), record.body.at("artefact"));
  }
}

std::optional<std::string> AcceptedState::result(const std::string& unit_id) const {
  const std::lock_guard lock(mutex_);
  const auto found = results_.find(unit_id);
  return found == results_.end() ? std::nullopt : std::optional(found->second);
}

core::ArtefactPtr AcceptedState::artefact(const std::string& id) const {
  {
    const std::lock_guard lock(mutex_);
    MORAINE_CHECK(artefacts_.contains(id), "artefact was never accepted: {}", id);
  }
  return store_.get(id);
}

void AcceptedState::accept(const std::string& unit_id, const std::string& artefact_id) {
  const std::lock_guard lock(mutex_);
  results_[unit_id] = artefact_id;
  artefacts_.insert(artefact_id);
}

void AcceptedState::forget_damaged() {
  const std::lock_guard lock(mutex_);
  std::erase_if(results_, [this](const auto& entry) {
    try {
      store_.get(entry.second);
      return false;
    } catch (const core::UserError& error) {
      core::log::warn("artefact is missing or damaged, its unit runs again: unit={} reason={}", entry.first,
                      error.what());
      return true;
    }
  });
  artefacts_.clear();
  for (const auto& [unit, artefact] : results_) artefacts_.insert(artefact);
}

}  // namespace moraine::coordinator
