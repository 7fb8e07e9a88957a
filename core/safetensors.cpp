#include "core/safetensors.h"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <limits>
#include <optional>
#include <set>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/checked_product.h"
#include "core/checksums.h"
#include "core/error.h"
#include "core/file.h"
#include "core/file_kind.h"
#include "core/file_name.h"
#include "core/json.h"

namespace moraine::core {

namespace {

namespace fs = std::filesystem;

static_assert(std::endian::native == std::endian::little, "safetensors is little-endian and mapped as it is");
constexpr size_t kLengthBytes = 8;
constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the limit of the reference implementation
constexpr const char* kMetadataKey = "__metadata__";

// Bytes of a tensor; nullopt when a side is negative or the product leaves 63 bits.
std::optional<int64_t> byte_size(const std::vector<int64_t>& shape, DType dtype) {
  return checked_product(shape, static_cast<int64_t>(size_of(dtype)));
}

bool by_name(const TensorView& a, const TensorView& b) { return a.name < b.name; }

const TensorView* find_sorted(const std::vector<TensorView>& tensors, std::string_view name) {
  const auto at = std::lower_bound(tensors.begin(), tensors.end(), name,
                                   [](const TensorView& tensor, std::string_view key) { return tensor.name < key; });
  return at != tensors.end() && at->name == name ? &*at : nullptr;
}

// Reads one file's header; every complaint names the file.
class HeaderParser {
 public:
  HeaderParser(std::span<const std::byte> file, const std::string& origin) : file_(file), origin_(origin) {}

  std::vector<TensorView> parse(std::map<std::string, std::string>& metadata) {
    const Json header = read_header();
    std::vector<TensorView> tensors;
    for (const auto& [name, entry] : header.items()) {
      if (name == kMetadataKey) {
        metadata = read_metadata(entry);
      } else {
        tensors.push_back(read_entry(name, entry));
      }
    }
    check_layout(tensors);
    std::sort(tensors.begin(), tensors.end(), by_name);
    return tensors;
  }

 private:
  template <typename... Args>
  [[noreturn]] void fail(fmt::format_string<Args...> text, Args&&... args) const {
    throw UserError(fmt::format("{}: {}", origin_, fmt::format(text, std::forward<Args>(args)...)),
                    "the file is damaged, incomplete or no safetensors file: copy or write it again");
  }

  Json read_header() {
    uint64_t length = 0;
    std::memcpy(&length, file_.data(), std::min(file_.size(), kLengthBytes));
    const bool plausible = file_.size() > kLengthBytes && length <= file_.size() - kLengthBytes &&
                           file_[kLengthBytes] == static_cast<std::byte>('{');
    if (const char* kind = plausible ? nullptr : kind_of_file(file_))
      throw UserError(fmt::format("{}: no safetensors file, but {}", origin_, kind),
                      "name a safetensors file; other formats are converted with the tool that wrote them");
    if (file_.size() < kLengthBytes)
      fail("truncated: expected at least {} bytes, the file has {}", kLengthBytes, file_.size());
    if (length > kMaxHeaderBytes) fail("header length {} is above the limit of {} bytes", length, kMaxHeaderBytes);
    if (length > file_.size() - kLengthBytes)
      fail("truncated: expected {} bytes of header, the file has {}", length, file_.size() - kLengthBytes);
    const std::string_view text(reinterpret_cast<const char*>(file_.data()) + kLengthBytes, length);
    if (!text.starts_with('{')) fail("the header does not start with '{{'");
    data_ = file_.subspan(kLengthBytes + length);
    Json header = parse_json(text, origin_ + ": header");
    return header;
  }

  std::map<std::string, std::string> read_metadata(const Json& entry) const {
    std::map<std::string, std::string> metadata;
    if (!entry.is_object()) fail("{} is not an object", kMetadataKey);
    for (const auto& [key, value] : entry.items()) {
      if (!value.is_string()) fail("{}: '{}' is not text", kMetadataKey, key);
      metadata.emplace(key, value.get<std::string>());
    }
    return metadata;
  }

  int64_t read_size(const Json& value, const std::string& name, const char* what) const {
    if (!value.is_number_unsigned() ||
        value.get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()))
      fail("tensor '{}': {} must be non-negative integers, found {}", name, what, value.dump());
    return value.get<int64_t>();
  }

  TensorView read_entry(const std::string& name, const Json& entry) const {
    if (!entry.is_object() || entry.size() != 3 || !entry.contains("dtype") || !entry.contains("shape") ||
        !entry.contains("data_offsets"))
      fail("tensor '{}': expected exactly dtype, shape and data_offsets", name);
    const Json &dtype_name = entry["dtype"], &shape = entry["shape"], &offsets = entry["data_offsets"];
    const auto dtype = dtype_name.is_string() ? dtype_from_safetensors(dtype_name.get<std::string>()) : std::nullopt;
    if (!dtype) fail("tensor '{}': unknown dtype {}", name, dtype_name.dump());
    if (!shape.is_array()) fail("tensor '{}': shape is not a list", name);
    TensorView tensor{.name = name, .dtype = *dtype, .shape = {}, .data = {}};
    for (const auto& side : shape) tensor.shape.push_back(read_size(side, name, "sides of the shape"));
    const auto bytes = byte_size(tensor.shape, *dtype);
    if (!bytes) fail("tensor '{}': the number of bytes of shape {} overflows", name, shape.dump());
    if (!offsets.is_array() || offsets.size() != 2) fail("tensor '{}': data_offsets is not a pair", name);
    const int64_t begin = read_size(offsets[0], name, "data_offsets"),
                  end = read_size(offsets[1], name, "data_offsets");
    if (end < begin || end - begin != *bytes)
      fail("tensor '{}': {} {} needs {} bytes, data_offsets {} hold {}", name, safetensors_name(*dtype), shape.dump(),
           *bytes, offsets.dump(), end - begin);
    if (static_cast<uint64_t>(end) > data_.size())
      fail("truncated: tensor '{}' ends at byte {} of the data, the file has {}", name, end, data_.size());
    tensor.data = data_.subspan(static_cast<size_t>(begin), static_cast<size_t>(*bytes));
    return tensor;
  }

  // Tensors must tile the data: no overlap, no gap, nothing after the last one.
  void check_layout(std::vector<TensorView>& tensors) const {
    const auto end_of = [](const TensorView& tensor) { return tensor.data.data() + tensor.data.size(); };
    std::sort(tensors.begin(), tensors.end(), [&](const TensorView& a, const TensorView& b) {
      return std::pair(a.data.data(), end_of(a)) < std::pair(b.data.data(), end_of(b));
    });
    const std::byte* expected = data_.data();
    for (const auto& tensor : tensors) {
      if (tensor.data.data() != expected)
        fail("tensor '{}' starts at byte {} of the data, expected {} ({})", tensor.name,
             tensor.data.data() - data_.data(), expected - data_.data(),
             tensor.data.data() < expected ? "tensors overlap" : "a gap that no tensor covers");
      expected = end_of(tensor);
    }
    if (const auto rest = data_.data() + data_.size() - expected) fail("{} bytes after the last tensor", rest);
  }

  std::span<const std::byte> file_, data_;
  const std::string& origin_;
};

// weight_map of a Hugging Face index, checked: file name -> names of its tensors.
std::map<std::string, std::set<std::string>> read_index(const fs::path& path) {
  const Json index = read_json(path);
  if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object() ||
      index["weight_map"].empty())
    throw UserError(fmt::format("{}: no weight_map in the index", path.string()), "download the model again");
  std::map<std::string, std::set<std::string>> shards;
  for (const auto& [name, file] : index["weight_map"].items()) {
    if (!file.is_string())
      throw UserError(fmt::format("{}: tensor '{}': {} is not a file name", path.string(), name, file.dump()),
                      "download the model again");
    shards[check_file_name(file.get_ref<const std::string&>(), "a shard", path.string())].insert(name);
  }
  return shards;
}

}  // namespace

Bytes::Bytes(std::vector<std::byte> data) {
  auto owner = std::make_shared<const std::vector<std::byte>>(std::move(data));
  span_ = *owner;
  owner_ = std::move(owner);
}

Bytes Bytes::map_file(const fs::path& path) {
  require_file(path);
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat info {};
  const bool readable = fd >= 0 && ::fstat(fd, &info) == 0;
  const auto size = static_cast<size_t>(info.st_size);
  void* data = nullptr;
  if (readable && S_ISREG(info.st_mode) && size > 0) data = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0);
  const int error = errno;
  if (fd >= 0) ::close(fd);
  if (!readable || data == MAP_FAILED)
    throw IoError(fmt::format("cannot map {}: {}", path.string(), std::strerror(error)));
  if (size == 0) return {};
  return {std::shared_ptr<const void>(data, [size](const void* start) { ::munmap(const_cast<void*>(start), size); }),
          {static_cast<const std::byte*>(data), size}};
}

int64_t TensorView::numel() const {
  const auto product = checked_product(shape);
  MORAINE_CHECK(product.has_value(), "tensor '{}': its number of values overflows", name);
  return *product;
}

Safetensors Safetensors::parse(Bytes bytes, std::string origin) {
  Safetensors file;
  file.bytes_ = std::move(bytes);
  file.origin_ = std::move(origin);
  file.tensors_ = HeaderParser(file.bytes_.span(), file.origin_).parse(file.metadata_);
  return file;
}

Safetensors Safetensors::open(const fs::path& path) { return parse(Bytes::map_file(path), path.string()); }

Safetensors open_checked(const fs::path& path) {
  Safetensors file = Safetensors::open(path);  // first: it says more about a file that is cut off
  check_checksum(path, file.bytes().span());
  return file;
}

const TensorView* Safetensors::find(std::string_view name) const { return find_sorted(tensors_, name); }

std::vector<std::byte> serialize_safetensors(std::span<const TensorView> tensors,
                                             const std::map<std::string, std::string>& metadata) {
  std::vector<const TensorView*> order;
  for (const auto& tensor : tensors) order.push_back(&tensor);
  // Wide elements first: gaps are not allowed, so this alone keeps every tensor aligned to its element.
  std::sort(order.begin(), order.end(), [](const TensorView* a, const TensorView* b) {
    return std::pair(-static_cast<int64_t>(size_of(a->dtype)), a->name) <
           std::pair(-static_cast<int64_t>(size_of(b->dtype)), b->name);
  });
  Json header = Json::object();
  if (!metadata.empty()) header[kMetadataKey] = metadata;
  size_t end = 0;
  for (const auto* tensor : order) {
    const auto bytes = byte_size(tensor->shape, tensor->dtype);
    MORAINE_CHECK(bytes && static_cast<size_t>(*bytes) == tensor->data.size(),
                  "tensor '{}': {} bytes do not fit its shape and dtype", tensor->name, tensor->data.size());
    MORAINE_CHECK(!header.contains(tensor->name), "tensor name '{}' stands twice or is reserved", tensor->name);
    header[tensor->name] = {{"dtype", safetensors_name(tensor->dtype)},
                            {"shape", tensor->shape},
                            {"data_offsets", {end, end + tensor->data.size()}}};
    end += tensor->data.size();
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const uint64_t length = text.size();

  std::vector<std::byte> out(kLengthBytes + text.size() + end);
  std::memcpy(out.data(), &length, kLengthBytes);
  std::memcpy(out.data() + kLengthBytes, text.data(), text.size());
  std::byte* at = out.data() + kLengthBytes + text.size();
  for (const auto* tensor : order) at = std::copy(tensor->data.begin(), tensor->data.end(), at);
  return out;
}

ShardedSafetensors ShardedSafetensors::open(const fs::path& directory) { return open_with(directory, open_checked); }

ShardedSafetensors ShardedSafetensors::open_unchecked(const fs::path& directory) {
  return open_with(directory, Safetensors::open);
}

ShardedSafetensors ShardedSafetensors::open_with(const fs::path& directory, Safetensors (*open_file)(const fs::path&)) {
  ShardedSafetensors model;
  const fs::path index = directory / "model.safetensors.index.json";
  if (fs::exists(directory / "model.safetensors")) {
    model.files_.push_back(open_file(directory / "model.safetensors"));
  } else if (!fs::exists(index)) {
    throw UserError(fmt::format("{}: neither model.safetensors nor model.safetensors.index.json", directory.string()),
                    "point to a Hugging Face model directory with safetensors weights");
  } else {
    for (const auto& [file, names] : read_index(index)) {
      if (!fs::exists(directory / file))
        throw UserError(fmt::format("{}: shard {} is missing", directory.string(), file), "download the model again");
      model.files_.push_back(open_file(directory / file));
      const auto& shard = model.files_.back();
      for (const auto& name : names)
        if (!shard.find(name))
          throw UserError(fmt::format("{}: tensor '{}' is not there, although the index says so", shard.origin(), name),
                          "index and shards belong to different versions: download the model again");
      for (const auto& tensor : shard.tensors())
        if (!names.contains(tensor.name))
          throw UserError(
              fmt::format("{}: tensor '{}' is not listed for this shard in the index", shard.origin(), tensor.name),
              "index and shards belong to different versions: download the model again");
    }
  }
  for (const auto& file : model.files_)
    model.tensors_.insert(model.tensors_.end(), file.tensors().begin(), file.tensors().end());
  std::sort(model.tensors_.begin(), model.tensors_.end(), by_name);
  return model;
}

const TensorView* ShardedSafetensors::find(std::string_view name) const { return find_sorted(tensors_, name); }

}  // namespace moraine::core
