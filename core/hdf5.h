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
/// stack is silenced and its innermost reason goes into the message. HDF5 is not thread-safe in Debian's build: every
/// call takes one process-wide lock inside.
class Hdf5File {
 public:
  enum class Mode { kRead, kCreate };
  /// Throws UserError if the file is missing or is no HDF5 file.
  Hdf5File(const std::filesystem::path& path, Mode mode);
  ~Hdf5File();
  Hdf5File(Hdf5File&&) noexcept;

  bool has(const std::string& dataset) const;
  /// Shape of a dataset. Throws UserError naming file and dataset when absent.
  std::vector<int64_t> shape(const std::string& dataset) const;
  /// Reads `count` rows from `first` along axis 0, converted to T. T: uint8_t, uint16_t, int32_t, uint32_t, int64_t, uint64_t, float, double.
  template <typename T>
  std::vector<T> read(const std::string& dataset, int64_t first, int64_t count) const;
  template <typename T>
  std::vector<T> read_all(const std::string& dataset) const;
  /// Creates a dataset, chunked and deflated (level 4) when it has more than 4096 elements. Groups in the path are made.
  template <typename T>
  void write(const std::string& dataset, std::span<const T> data, const std::vector<int64_t>& shape);

  /// Attributes of the root group. Missing -> nullopt; wrong type -> UserError.
  std::optional<std::string> text_attribute(const std::string& name) const;
  std::optional<int64_t> int_attribute(const std::string& name) const;
  std::optional<double> real_attribute(const std::string& name) const;
  void set_attribute(const std::string& name, const std::string& value);
  void set_attribute(const std::string& name, int64_t value);
  void set_attribute(const std::string& name, double value);

  const std::filesystem::path& path() const;

 private:
  struct Handle;
  std::unique_ptr<Handle> handle_;
};

}  // namespace moraine::core
