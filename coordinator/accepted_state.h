#pragma once

#include <map>
#include <mutex>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "algorithms/unit.h"
#include "coordinator/journal.h"
#include "coordinator/run_directory.h"
#include "coordinator/store.h"

namespace moraine::coordinator {

/// What a run directory's journal and store hold, as plan(), reports and `moraine ls` see it. Works on a directory that
/// another process is writing. Thread-safe.
class AcceptedState final : public algorithms::RunState {
 public:
  /// Replays the ACCEPT records; the last one of a unit counts. Reads no artefact.
  AcceptedState(const RunLayout& layout, std::span<const Record> records);

  std::optional<std::string> result(const std::string& unit_id) const override;
  /// Throws InternalError if the id was never accepted, UserError if its file is missing or damaged.
  core::ArtefactPtr artefact(const std::string& id) const override;

  /// Stores the artefact durably. Throws IoError.
  void store(const core::Artefact& artefact) { store_.put(artefact); }
  /// Notes a stored artefact as the result of a unit.
  void accept(const std::string& unit_id, const std::string& artefact_id);
  /// Reads every accepted artefact and forgets the units whose artefact is missing or damaged, with a warning each, so
  /// that the plan asks for them again.
  void forget_damaged();

 private:
  mutable Store store_;  // caches mappings
  mutable std::mutex mutex_;
  std::map<std::string, std::string> results_;  // unit id -> artefact id
  std::set<std::string> artefacts_;
};

}  // namespace moraine::coordinator
