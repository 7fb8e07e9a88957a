#pragma once

#include <deque>
#include <filesystem>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <unordered_map>

#include "algorithms/unit.h"
#include "coordinator/journal.h"

namespace moraine::coordinator {

/// What a run directory's journal and artefacts hold, as plan(), reports and `moraine ls` see it. Artefacts lie on disk
/// by id: DIRECTORY/ab/cd<rest of the id>.safetensors. Works on a directory that another process is writing.
/// Thread-safe.
class AcceptedState final : public algorithms::RunState {
 public:
  /// Replays the ACCEPT records; the last one of a unit counts. Reads no artefact.
  AcceptedState(std::filesystem::path artefacts, std::span<const Record> records);

  std::optional<std::string> result(const std::string& unit_id) const override;
  /// Mapped from its file, which is checked against the hash whenever it is opened; those used last stay open. Throws
  /// InternalError if the id was never accepted, UserError if its file is missing or damaged.
  core::ArtefactPtr artefact(const std::string& id) const override;
  bool keeps_finished_specs() const override { return false; }
  algorithms::PlanMemory* memory() const override { return memory_.get(); }
  /// From now on plans remember what earlier ones found finished. They must be made by one thread.
  void remember_plans() { memory_ = std::make_unique<algorithms::PlanMemory>(); }
  std::filesystem::path path_of(const std::string& artefact_id) const;

  /// Durable when it returns; a file of that id that is whole already is left alone. Throws IoError (disk full,
  /// read-only).
  void store(const core::Artefact& artefact) const;
  /// Notes a stored artefact as the result of a unit.
  void accept(const std::string& unit_id, const std::string& artefact_id);
  /// Reads every accepted artefact and forgets the units whose artefact is missing or damaged, with a warning each, so
  /// that the plan asks for them again.
  void forget_damaged();

 private:
  core::ArtefactPtr open(const std::string& id) const;

  std::filesystem::path directory_;
  mutable std::mutex mutex_;
  std::unordered_map<std::string, std::string> results_;  // unit id -> artefact id
  // By id, empty while nobody holds it open.
  mutable std::unordered_map<std::string, std::weak_ptr<const core::Artefact>> artefacts_;
  // Opened last, so that a plan which reads them again does not map them again. Bounded: a process may have 65,530
  // mappings (vm.max_map_count) and a run more artefacts.
  mutable std::deque<core::ArtefactPtr> open_;
  std::unique_ptr<algorithms::PlanMemory> memory_;
};

}  // namespace moraine::coordinator
