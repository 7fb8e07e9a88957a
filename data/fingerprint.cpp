#include "data/fingerprint.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>
#include <span>
#include <vector>

#include <sys/stat.h>

#include "core/checked_product.h"
#include "core/error.h"
#include "core/hash.h"
#include "core/json.h"

namespace moraine::data {
namespace {

constexpr int64_t kBlockBytes = int64_t{1} << 22;

// "DATASET SHA256\n" of all values as T, read in blocks; "" when there is no such dataset.
template <typename T>
std::string line_of(const core::Hdf5File& file, const std::string& dataset) {
  if (!file.has(dataset)) return "";
  const std::vector<int64_t> shape = file.shape(dataset);
  const auto row =
      shape.empty() ? std::optional<int64_t>(sizeof(T)) : core::checked_product(std::span(shape).subspan(1), sizeof(T));
  if (!row)
    throw core::UserError(fmt::format("data: {}: {} has rows of an impossible size", file.path().string(), dataset),
                          "the file is damaged: make it again");
  const int64_t row_bytes = std::max<int64_t>(1, *row);
  const bool nothing = std::ranges::find(shape, 0) != shape.end();  // however many rows it says it has
  const int64_t rows = nothing ? 0 : shape.empty() ? 1 : shape[0], step = std::max<int64_t>(1, kBlockBytes / row_bytes);
  core::Sha256 hash;
  for (int64_t first = 0; first < rows; first += step) {
    const std::vector<T> values = file.read<T>(dataset, first, std::min(step, rows - first));
    hash.add(std::as_bytes(std::span(values)));
  }
  return dataset + " " + hash.finish() + "\n";
}

// What tells whether a file is still the one that was read.
using Stamp = std::array<int64_t, 5>;

Stamp stamp_of(const std::filesystem::path& path) {
  struct stat info {};
  if (::stat(path.c_str(), &info) != 0)
    throw core::IoError(fmt::format("cannot look at {}: {}", path.string(), std::strerror(errno)));
  return {static_cast<int64_t>(info.st_dev), static_cast<int64_t>(info.st_ino), info.st_size,
          info.st_mtim.tv_sec * 1'000'000'000 + info.st_mtim.tv_nsec,
          info.st_ctim.tv_sec * 1'000'000'000 + info.st_ctim.tv_nsec};
}

}  // namespace

std::string text_fingerprint(const core::Hdf5File& file) {
  std::string text =
      fmt::format("moraine-text-domain 1\n{} {} {}\n", file.text_attribute("tokenizer").value_or(""),
                  file.int_attribute("vocab_size").value_or(0), file.int_attribute("end_of_document").value_or(0));
  for (const std::string split : {"train", "validation", "test"}) {
    text += line_of<uint32_t>(file, split + "/tokens");
    text += line_of<int64_t>(file, split + "/byte_offsets");
    text += line_of<int64_t>(file, split + "/documents");
  }
  return core::sha256(text);
}

std::string image_fingerprint(const core::Hdf5File& file) {
  const std::vector<int64_t> shape = file.shape("train/images");
  const core::Json names = core::parse_json(file.text_attribute("class_names").value_or("[]"), file.path().string());
  std::string text = "moraine-images 1\n";
  for (size_t axis = 1; axis < shape.size(); ++axis) text += fmt::format("{} ", shape[axis]);
  text += fmt::format("{}\n", names.size());
  for (const std::string split : {"train", "test"}) {
    text += line_of<uint8_t>(file, split + "/images");
    text += line_of<int64_t>(file, split + "/labels");
  }
  return core::sha256(text);
}

std::string examples_fingerprint(const core::Hdf5File& file) {
  std::string text = fmt::format(
      "moraine-text-examples 1\n{} {}\n{} {} {}\n", file.text_attribute("task").value_or(""),
      core::sha256(file.text_attribute("class_names").value_or("[]")), file.text_attribute("tokenizer").value_or(""),
      file.int_attribute("vocab_size").value_or(0), file.int_attribute("end_of_document").value_or(0));
  for (const std::string split : {"train", "validation", "test"}) {
    text += line_of<uint32_t>(file, split + "/tokens");
    for (const char* name : {"/examples", "/prompts", "/labels", "/groups", "/bytes"})
      text += line_of<int64_t>(file, split + name);
  }
  return core::sha256(text);
}

void verify_fingerprint(const core::Hdf5File& file, std::string (*content_of)(const core::Hdf5File&)) {
  static std::mutex mutex;
  static std::map<Stamp, std::string> known;  // content, by what the file looked like
  const Stamp before = stamp_of(file.path());
  std::string content;
  {
    const std::lock_guard lock(mutex);
    if (const auto found = known.find(before); found != known.end()) content = found->second;
  }
  if (content.empty()) {
    content = content_of(file);
    const std::lock_guard lock(mutex);
    if (stamp_of(file.path()) == before) known[before] = content;
  }
  const std::string claimed = file.text_attribute("fingerprint").value_or("");
  if (content != claimed)
    throw core::UserError(
        fmt::format("data: {}: the content is not what its fingerprint says: {} is written there, the content has {}",
                    file.path().string(), claimed, content),
        "the file is damaged or was changed after it was prepared: prepare it again (docs/data.md)");
}

}  // namespace moraine::data
