#include "core/checksums.h"

#include <algorithm>

#include "core/error.h"
#include "core/file.h"
#include "core/file_name.h"
#include "core/hash.h"
#include "core/safetensors.h"

namespace moraine::core {

namespace fs = std::filesystem;

Checksums read_checksums(const fs::path& directory) {
  const fs::path path = directory / kChecksumsFile;
  if (!fs::exists(path)) return {};
  constexpr size_t kDigits = 64;
  const auto hexadecimal = [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); };
  const std::string text = read_text(path);
  Checksums sums;
  for (size_t start = 0, end; start < text.size(); start = end + 1) {
    end = std::min(text.find('\n', start), text.size());
    const std::string line = text.substr(start, end - start);
    if (line.size() < kDigits + 3 || line[kDigits] != ' ' || (line[kDigits + 1] != ' ' && line[kDigits + 1] != '*') ||
        !std::all_of(line.begin(), line.begin() + kDigits, hexadecimal))
      throw UserError(fmt::format("{}: not a line of sha256sum: '{}'", path.string(), line.substr(0, 100)),
                      "remove the file if you do not know it; weights are then read unchecked");
    const std::string name = line.substr(kDigits + 2);
    if (name.find('/') == std::string::npos)
      sums[check_file_name(name, "a file", path.string())] = line.substr(0, kDigits);
  }
  return sums;
}

void write_checksums(const fs::path& directory, const Checksums& sums) {
  std::string text;
  for (const auto& [name, sum] : sums) text += fmt::format("{}  {}\n", sum, name);
  write_atomically(directory / kChecksumsFile, text);
}

void check_checksum(const fs::path& file, std::span<const std::byte> bytes) {
  const fs::path directory = file.has_parent_path() ? file.parent_path() : fs::path(".");
  const Checksums sums = read_checksums(directory);
  const auto expected = sums.find(file.filename().string());
  if (expected == sums.end()) return;
  const std::string found = sha256(bytes);
  if (found != expected->second)
    throw UserError(fmt::format("{}: damaged or changed: {} says SHA-256 {}, the file has {} over {} bytes",
                                file.string(), kChecksumsFile, expected->second, found, bytes.size()),
                    "a run writes it again when it is continued (moraine run); "
                    "remove SHA256SUMS if the file was changed on purpose");
}

std::map<std::string, std::string> damaged_files(const fs::path& directory) {
  std::map<std::string, std::string> damaged;
  for (const auto& [name, sum] : read_checksums(directory)) {
    const fs::path file = directory / name;
    const std::string found = fs::exists(file) ? sha256(Bytes::map_file(file).span()) : "missing";
    if (found != sum) damaged[name] = found;
  }
  return damaged;
}

}  // namespace moraine::core
