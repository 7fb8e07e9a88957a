#include "coordinator/accepted_state.h"

#include "core/error.h"
#include "core/file.h"
#include "core/log.h"

namespace moraine::coordinator {
namespace {

constexpr size_t kMostOpen = 1024;

}  // namespace

AcceptedState::AcceptedState(std::filesystem::path artefacts, std::span<const Record> records)
    : directory_(std::move(artefacts)) {
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
  const std::lock_guard lock(mutex_);
  const auto known = artefacts_.find(id);
  MORAINE_CHECK(known != artefacts_.end(), "artefact was never accepted: {}", id);
  if (core::ArtefactPtr artefact = known->second.lock()) return artefact;
  core::ArtefactPtr artefact = open(id);
  known->second = artefact;
  open_.push_back(artefact);
  if (open_.size() > kMostOpen) open_.pop_front();
  return artefact;
}

std::filesystem::path AcceptedState::path_of(const std::string& artefact_id) const {
  if (artefact_id.size() != 64)
    throw core::UserError(fmt::format("coordinator: '{}' names no artefact", artefact_id.substr(0, 100)),
                          "the journal was changed, or another program wrote it");
  return directory_ / artefact_id.substr(0, 2) / (artefact_id.substr(2) + ".safetensors");
}

core::ArtefactPtr AcceptedState::open(const std::string& id) const {
  const std::filesystem::path path = path_of(id);
  return core::Artefact::parse(core::Bytes::map_file(path), id, path.string());
}

void AcceptedState::store(const core::Artefact& artefact) const {
  const std::filesystem::path path = path_of(artefact.id());
  try {
    if (std::filesystem::exists(path)) {
      open(artefact.id());
      return;
    }
  } catch (const std::exception& error) {
    core::log::warn("a stored artefact is damaged and written again: path={} reason={}", path.string(), error.what());
  }
  core::write_atomically(path, artefact.bytes().span());
}

void AcceptedState::accept(const std::string& unit_id, const std::string& artefact_id) {
  const std::lock_guard lock(mutex_);
  results_[unit_id] = artefact_id;
  artefacts_.try_emplace(artefact_id);
}

void AcceptedState::forget_damaged() {
  const std::lock_guard lock(mutex_);
  std::erase_if(results_, [this](const auto& entry) {
    try {
      open(entry.second);
      return false;
    } catch (const core::UserError& error) {
      core::log::warn("artefact is missing or damaged, its unit runs again: unit={} reason={}", entry.first,
                      error.what());
      artefacts_.erase(entry.second);
      return true;
    }
  });
}

}  // namespace moraine::coordinator
