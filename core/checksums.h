#pragma once

#include <cstddef>
#include <filesystem>
#include <map>
#include <span>
#include <string>

namespace moraine::core {

/// SHA-256 of a directory's files by name, kept beside them in SHA256SUMS as `sha256sum` writes it
/// (`sha256sum -c SHA256SUMS` checks them too). Directories that Moraine publishes have one; readers compare, so that
/// damaged weights do not leave a run unnoticed.
using Checksums = std::map<std::string, std::string>;

inline constexpr const char* kChecksumsFile = "SHA256SUMS";

/// Empty when the directory has no SHA256SUMS. Throws UserError if a line of it is malformed.
Checksums read_checksums(const std::filesystem::path& directory);
/// Throws IoError.
void write_checksums(const std::filesystem::path& directory, const Checksums& sums);
/// Throws UserError if the SHA256SUMS beside `file` lists it with another hash than that of `bytes`, its content.
void check_checksum(const std::filesystem::path& file, std::span<const std::byte> bytes);
/// The names of the files in `directory` that differ from its SHA256SUMS or are missing. Reads all that are listed.
std::map<std::string, std::string> damaged_files(const std::filesystem::path& directory);

}  // namespace moraine::core
