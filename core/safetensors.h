#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/dtype.h"

namespace moraine::core {

/// Immutable bytes with shared ownership: a buffer in memory or a mapped file.
class Bytes {
 public:
  Bytes() = default;
  explicit Bytes(std::vector<std::byte> data);
  /// Maps a file read-only. Throws UserError if it is missing or no regular file, IoError if mapping fails.
  static Bytes map_file(const std::filesystem::path& path);

  std::span<const std::byte> span() const { return span_; }
  size_t size() const { return span_.size(); }

 private:
  Bytes(std::shared_ptr<const void> owner, std::span<const std::byte> span) : owner_(std::move(owner)), span_(span) {}
  std::shared_ptr<const void> owner_;
  std::span<const std::byte> span_;
};

/// One named tensor inside somebody else's bytes: row-major, contiguous, little-endian.
struct TensorView {
  std::string name;
  DType dtype;
  std::vector<int64_t> shape;
  std::span<const std::byte> data;

  /// Throws InternalError if the product leaves 63 bits, which no parsed file's does.
  int64_t numel() const;
};

/// A parsed safetensors file. Strict: header length, JSON, offsets, overlaps, gaps, sizes and trailing bytes are all
/// checked before a tensor is handed out. Views stay valid while the object (or a copy of it) lives. Thread-safe to
/// read. Data of files written elsewhere may be unaligned. Overwriting a file in place while it is mapped is undefined.
///
///   const auto file = Safetensors::open("expert.safetensors");
///   const TensorView* weight = file.find("layers.0.up.lora_A");   // shape, dtype and bytes; nullptr when absent
class Safetensors {
 public:
  /// Throws UserError naming `origin`, the tensor and the bytes if the file is truncated or malformed.
  static Safetensors parse(Bytes bytes, std::string origin);
  static Safetensors open(const std::filesystem::path& path);

  const std::vector<TensorView>& tensors() const { return tensors_; }  // sorted by name
  const TensorView* find(std::string_view name) const;                 // nullptr when absent
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const Bytes& bytes() const { return bytes_; }
  const std::string& origin() const { return origin_; }

 private:
  Bytes bytes_;
  std::string origin_;
  std::vector<TensorView> tensors_;
  std::map<std::string, std::string> metadata_;
};

/// Opens a file and compares it with the checksums that lie beside it, if there are any (core/checksums.h).
/// Throws UserError if it is damaged.
Safetensors open_checked(const std::filesystem::path& path);

/// Serialises canonically: sorted keys, the data 8-byte aligned and without gaps, wide elements first, then by name, so
/// that every tensor is aligned to its element; equal input in any order gives equal bytes. Throws InternalError on
/// duplicate names or a size that disagrees with shape and dtype.
std::vector<std::byte> serialize_safetensors(std::span<const TensorView> tensors,
                                             const std::map<std::string, std::string>& metadata);

/// All tensors of a Hugging Face directory: model.safetensors, or the shards of model.safetensors.index.json, each
/// compared with the directory's checksums if it has any. Throws UserError if a shard is missing or if index and shards
/// disagree about where a tensor is (so none stands twice).
class ShardedSafetensors {
 public:
  static ShardedSafetensors open(const std::filesystem::path& directory);
  /// Without comparing checksums, to look at what is damaged.
  static ShardedSafetensors open_unchecked(const std::filesystem::path& directory);
  const std::vector<TensorView>& tensors() const { return tensors_; }
  const TensorView* find(std::string_view name) const;

 private:
  static ShardedSafetensors open_with(const std::filesystem::path& directory,
                                      Safetensors (*open_file)(const std::filesystem::path&));
  std::vector<Safetensors> files_;
  std::vector<TensorView> tensors_;
};

}  // namespace moraine::core
