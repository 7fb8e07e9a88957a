#include "cli/published.h"

#include <algorithm>

#include "core/error.h"
#include "core/file.h"
#include "core/hash.h"
#include "core/json.h"
#include "core/log.h"
#include "core/safetensors.h"

namespace moraine::cli {
namespace {

namespace fs = std::filesystem;

constexpr const char* kRecord = "published.json";
constexpr const char* kHint = "`moraine run` with the run's recipe publishes it again from the artefacts";

std::vector<PublishedFile> files_in(const fs::path& directory) {
  std::vector<PublishedFile> files;
  if (!fs::is_directory(directory)) return files;
  for (const auto& entry : fs::recursive_directory_iterator(directory))
    if (entry.is_regular_file())
      files.push_back({entry.path(), core::sha256(core::Bytes::map_file(entry.path()).span())});
  std::sort(files.begin(), files.end(), [](const auto& a, const auto& b) { return a.path < b.path; });
  return files;
}

std::string key_of(const PublishedFile& file, const fs::path& root) {
  return file.path.lexically_relative(root).generic_string();
}

}  // namespace

void record_published(const fs::path& root) {
  core::Json files = core::Json::object();
  for (const char* name : {"backbone", "experts", "merged_model", "mixture", "public_model"})
    for (const auto& file : files_in(root / name)) files[key_of(file, root)] = file.sha256;
  core::write_atomically(root / kRecord, core::Json{{"files", files}}.dump(1) + "\n");
}

std::vector<PublishedFile> verified_files(const fs::path& root, const std::string& name) {
  const auto files = files_in(root / name);
  if (!fs::exists(root / kRecord)) {
    core::log::warn("nothing to compare with, made by an older version: directory={}", (root / name).string());
    return files;
  }
  const core::Json recorded = core::read_json(root / kRecord).at("files");
  for (const auto& file : files)
    if (recorded.value(key_of(file, root), "") != file.sha256)
      throw core::UserError(
          fmt::format("cli: {} is not what the run published: its SHA-256 is {}", file.path.string(), file.sha256),
          kHint);
  for (const auto& [key, hash] : recorded.items())
    if (key.starts_with(name + "/") && !fs::exists(root / key))
      throw core::UserError(fmt::format("cli: {} is missing", (root / key).string()), kHint);
  return files;
}

}  // namespace moraine::cli
