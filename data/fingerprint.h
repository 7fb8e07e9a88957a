#pragma once

#include <string>

#include "core/hdf5.h"

namespace moraine::data {

/// The fingerprint that a prepared file's content has by the rules of docs/data.md, whatever its attribute says. Reads
/// all of it, a block at a time. Throws as Hdf5File::read().
std::string text_fingerprint(const core::Hdf5File& file);
std::string image_fingerprint(const core::Hdf5File& file);
std::string examples_fingerprint(const core::Hdf5File& file);

/// Throws UserError if the attribute `fingerprint` is not `content_of(file)`: units are named by it, so that content
/// edited under an old fingerprint would get old results. A file whose place, size and times have not changed is read
/// once per process. Thread-safe.
void verify_fingerprint(const core::Hdf5File& file, std::string (*content_of)(const core::Hdf5File&));

}  // namespace moraine::data
