#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace moraine::core {

/// RAII over the HDF5 C API: numeric datasets and scalar attributes, which is all Moraine stores. HDF5's own error
/// stack is silenced and its innermost reason goes into the message, with a hint for that kind of error: a lock, a
/// truncated file, another format, a dataset that is not there. Not every build of HDF5 is thread-safe: every
/// call takes one process-wide lock inside.
///
///   Hdf5File file("german.h5", Hdf5File::Mode::kRead);
///   std::vector<int32_t> tokens = file.read<int32_t>("train/tokens", first, count);
class Hdf5File {
 public:
  enum class Mode { kRead, kCreate };
  /// kCreate builds the file in memory; it appears whole, replacing what was there, when it is closed.
  /// Throws UserError if a file to read is missing, no regular file, no HDF5 file or truncated; IoError if it is locked
  /// or may not be read.
  Hdf5File(const std::filesystem::path& path, Mode mode);
  /// Closes; a failure then can only be logged, and while an exception unwinds nothing is written. Call close().
  ~Hdf5File();
  Hdf5File(Hdf5File&&) noexcept;
  /// Writes a new file out as write_atomically does, and closes. Throws IoError. Nothing may be called afterwards.
  void close();

  bool has(const std::string& dataset) const;
  /// Shape of a dataset. Throws UserError naming file and dataset when absent.
  std::vector<int64_t> shape(const std::string& dataset) const;
  /// Reads `count` rows from `first` along axis 0, converted to T. T: uint8_t, uint16_t, int32_t, uint32_t, int64_t,
  /// uint64_t, float, double. Throws UserError when the rows are not there, the dataset is not numeric, a value does
  /// not fit T, or the extents are more than the file's bytes can hold (nothing is allocated then).
  template <typename T>
  std::vector<T> read(const std::string& dataset, int64_t first, int64_t count) const;
  template <typename T>
  std::vector<T> read_all(const std::string& dataset) const;
  /// Creates a dataset, chunked, shuffled and deflated (level 4) when it has more than 4096 elements. Groups in the
  /// path are made. Throws IoError.
  template <typename T>
  void write(const std::string& dataset, std::span<const T> data, const std::vector<int64_t>& shape);

  /// A dataset as it is stored; `type` is "int32", "uint8", "float64", ..., "text" or "other".
  struct Dataset {
    std::string name, type;
    std::vector<int64_t> shape;
  };
  /// All datasets, sorted by name, which is the path from the root group. Throws IoError.
  std::vector<Dataset> datasets() const;

  /// Attributes of the root group as text; "..." for those that are neither text nor one integer.
  std::map<std::string, std::string> attributes() const;
  /// Attributes of the root group. Missing -> nullopt; wrong type -> UserError.
  std::optional<std::string> text_attribute(const std::string& name) const;
  std::optional<int64_t> int_attribute(const std::string& name) const;
  void set_attribute(const std::string& name, const std::string& value);
  void set_attribute(const std::string& name, int64_t value);

  const std::filesystem::path& path() const;

 private:
  struct Handle;
  std::unique_ptr<Handle> handle_;
};

}  // namespace moraine::core
