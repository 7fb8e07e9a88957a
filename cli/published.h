#pragma once

#include <filesystem>
#include <string>
#include <vector>

// Directories that a finished run writes for other tools: RUN/mixture, RUN/public_model, RUN/experts and the like.
namespace moraine::cli {

struct PublishedFile {
  std::filesystem::path path;
  std::string sha256;
};

/// Notes the SHA-256 of every file in these directories in RUN/published.json.
void record_published(const std::filesystem::path& root);

/// The files of RUN/<name>, in order, each read and compared with RUN/published.json. Throws UserError if one is
/// missing, changed or not among those recorded. A run of an older version has no record: then a warning says that
/// nothing was compared.
std::vector<PublishedFile> verified_files(const std::filesystem::path& root, const std::string& name);

}  // namespace moraine::cli
