#include "coordinator/store.h"

#include "core/error.h"
#include "core/file.h"

namespace moraine::coordinator {

std::filesystem::path Store::path_of(const std::string& id) const {
  MORAINE_CHECK_EQ(id.size(), size_t{64});
  return directory_ / id.substr(0, 2) / (id.substr(2) + ".safetensors");
}

void Store::put(const core::Artefact& artefact) {
  try {
    get(artefact.id());
  } catch (const core::UserError&) {  // missing or damaged: write it
    core::write_atomically(path_of(artefact.id()), artefact.bytes().span());
  }
}

core::ArtefactPtr Store::get(const std::string& id) {
  const std::lock_guard lock(mutex_);
  if (const auto known = mapped_.find(id); known != mapped_.end()) return known->second;
  const std::filesystem::path path = path_of(id);
  return mapped_[id] = core::Artefact::parse(core::Bytes::map_file(path), id, path.string());
}

}  // namespace moraine::coordinator
