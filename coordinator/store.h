#pragma once

#include <filesystem>
#include <map>
#include <mutex>
#include <string>

#include "core/artefact.h"

namespace moraine::coordinator {

/// Artefacts on disk by id: DIRECTORY/ab/cd<rest of the id>.safetensors. Thread-safe.
class Store {
 public:
  explicit Store(std::filesystem::path directory) : directory_(std::move(directory)) {}

  std::filesystem::path path_of(const std::string& id) const;
  /// Durable when it returns; a file of that id that is whole already is left alone. Throws IoError (disk full,
  /// read-only).
  void put(const core::Artefact& artefact);
  /// Mapped from its file; the hash is checked the first time. Throws UserError if the file is missing or damaged.
  core::ArtefactPtr get(const std::string& id);

 private:
  std::filesystem::path directory_;
  std::mutex mutex_;
  std::map<std::string, core::ArtefactPtr> mapped_;  // file mappings: they cost address space, not memory
};

}  // namespace moraine::coordinator
