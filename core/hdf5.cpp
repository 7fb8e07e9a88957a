#include "core/hdf5.h"

#include <algorithm>
#include <exception>
#include <mutex>
#include <numeric>
#include <type_traits>
#include <utility>

#include <hdf5.h>

#include "core/checked_product.h"
#include "core/error.h"
#include "core/file.h"
#include "core/file_kind.h"
#include "core/log.h"
#include "core/registry.h"
#include "core/safetensors.h"

namespace moraine::core {

namespace {

constexpr hsize_t kChunkElements = 1 << 16;
constexpr size_t kMemoryStep = 1 << 20;     // bytes by which a file in memory grows
constexpr int64_t kSmallElements = 4096;    // not worth a chunk index
constexpr int64_t kMostCompression = 4096;  // deflate packs 1032 zeros into a byte; other filters are not far from it

std::mutex& library_mutex() {
  static std::mutex mutex;
  return mutex;
}

// Holds the library and keeps it from printing its error stack, which belongs to the thread in thread-safe builds.
class Library {
 public:
  Library() : lock_(library_mutex()) { H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr); }

 private:
  std::lock_guard<std::mutex> lock_;
};

// Closes its identifier; negative means that the call which made it failed.
class Id {
 public:
  using Close = herr_t (*)(hid_t);
  Id(hid_t id, Close close) : id_(id), close_(close) {}
  ~Id() {
    if (id_ >= 0) close_(id_);
  }
  Id(const Id&) = delete;
  Id& operator=(const Id&) = delete;
  Id(Id&& other) noexcept : id_(std::exchange(other.id_, -1)), close_(other.close_) {}
  operator hid_t() const { return id_; }  // NOLINT(google-explicit-constructor): it is passed to the C API
  bool ok() const { return id_ >= 0; }

 private:
  hid_t id_;
  Close close_;
};

// What the innermost function of the failed call said.
std::string last_reason() {
  std::string reason;
  const H5E_walk2_t first = [](unsigned, const H5E_error2_t* error, void* out) -> herr_t {
    auto& text = *static_cast<std::string*>(out);
    if (text.empty() && error->desc) text = error->desc;
    return 0;
  };
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, first, &reason);
  return reason.empty() ? "HDF5 gave no reason" : reason;
}

constexpr const char* kOtherFile = "check that this is the file you meant";
constexpr const char* kDamaged = "the file is damaged or was not written to its end: copy it or make it again";

// Opening a file failed: what kind of trouble it is decides who can end it.
[[noreturn]] void throw_cannot_open(const std::filesystem::path& path) {
  const std::string reason = last_reason();
  if (reason.find("lock file") != std::string::npos)  // "unable to lock file, errno = 11, ..."
    throw IoError(fmt::format("{}: cannot be opened, the file is locked: {}", path.string(), reason),
                  "wait until no program has it open for writing; where locks do not work (network file systems) set "
                  "HDF5_USE_FILE_LOCKING=FALSE");
  throw UserError(fmt::format("{}: cannot be opened: {}", path.string(), reason), kDamaged);
}

template <typename T>
hid_t memory_type() {
  if constexpr (std::is_same_v<T, uint8_t>)
    return H5T_NATIVE_UINT8;
  else if constexpr (std::is_same_v<T, uint16_t>)
    return H5T_NATIVE_UINT16;
  else if constexpr (std::is_same_v<T, int32_t>)
    return H5T_NATIVE_INT32;
  else if constexpr (std::is_same_v<T, uint32_t>)
    return H5T_NATIVE_UINT32;
  else if constexpr (std::is_same_v<T, int64_t>)
    return H5T_NATIVE_INT64;
  else if constexpr (std::is_same_v<T, uint64_t>)
    return H5T_NATIVE_UINT64;
  else if constexpr (std::is_same_v<T, float>)
    return H5T_NATIVE_FLOAT;
  else {
    static_assert(std::is_same_v<T, double>);
    return H5T_NATIVE_DOUBLE;
  }
}

// HDF5 clips a value that does not fit; we refuse it.
H5T_conv_ret_t refuse_lossy(H5T_conv_except_t what, hid_t, hid_t, void*, void*, void* lossy) {
  if (what == H5T_CONV_EXCEPT_PRECISION) return H5T_CONV_UNHANDLED;  // rounding to a float
  *static_cast<bool*>(lossy) = true;
  return H5T_CONV_ABORT;
}

std::string type_name(hid_t type) {
  const size_t bits = 8 * H5Tget_size(type);
  switch (H5Tget_class(type)) {
    case H5T_INTEGER:
      return fmt::format("{}int{}", H5Tget_sign(type) == H5T_SGN_NONE ? "u" : "", bits);
    case H5T_FLOAT:
      return fmt::format("float{}", bits);
    case H5T_STRING:
      return "text";
    default:
      return "other";
  }
}

std::vector<hsize_t> chunk_of(const std::vector<hsize_t>& dims) {
  std::vector<hsize_t> chunk = dims;
  const hsize_t row = std::accumulate(dims.begin() + 1, dims.end(), hsize_t{1}, std::multiplies<>());
  chunk[0] = std::clamp<hsize_t>(kChunkElements / row, 1, dims[0]);
  return chunk;
}

}  // namespace

struct Hdf5File::Handle {
  std::filesystem::path path;
  bool is_new = false;
  int unwinding = std::uncaught_exceptions();
  hid_t file = -1;

  template <typename... Args>
  [[noreturn]] void fail_user(const std::string& hint, fmt::format_string<Args...> text, Args&&... args) const {
    throw UserError(fmt::format("{}: {}", path.string(), fmt::format(text, std::forward<Args>(args)...)), hint);
  }
  template <typename... Args>
  [[noreturn]] void fail_io(fmt::format_string<Args...> text, Args&&... args) const {
    throw IoError(
        fmt::format("{}: {}: {}", path.string(), fmt::format(text, std::forward<Args>(args)...), last_reason()),
        "check the path and the memory left");
  }

  // H5Lexists wants every group on the way to exist.
  bool has(const std::string& name) const {
    for (size_t end = name.find('/', 1);; end = name.find('/', end + 1)) {
      if (H5Lexists(file, name.substr(0, end).c_str(), H5P_DEFAULT) <= 0) return false;
      if (end == std::string::npos) return true;
    }
  }
  Id open(const std::string& name) const {
    if (!has(name)) fail_user(name_hint(name, dataset_names()), "no dataset '{}'", name);
    Id dataset(H5Dopen2(file, name.c_str(), H5P_DEFAULT), H5Dclose);
    if (!dataset.ok()) fail_user(name_hint(name, dataset_names()), "'{}' is no dataset: {}", name, last_reason());
    return dataset;
  }
  std::vector<std::string> dataset_names() const {
    std::vector<std::string> names;
    const H5O_iterate_t note = [](hid_t, const char* name, const H5O_info_t* info, void* out) -> herr_t {
      if (info->type == H5O_TYPE_DATASET) static_cast<std::vector<std::string>*>(out)->emplace_back(name);
      return 0;
    };
    if (H5Ovisit2(file, H5_INDEX_NAME, H5_ITER_INC, note, &names, H5O_INFO_BASIC) < 0)
      fail_io("cannot list the datasets");
    std::sort(names.begin(), names.end());
    return names;
  }
  std::vector<int64_t> shape_of(hid_t dataset) const {
    const Id space(H5Dget_space(dataset), H5Sclose);
    const int rank = H5Sget_simple_extent_ndims(space);
    if (rank < 0) fail_io("cannot read a shape");
    std::vector<hsize_t> dims(static_cast<size_t>(rank));
    H5Sget_simple_extent_dims(space, dims.data(), nullptr);
    std::vector<int64_t> shape(dims.begin(), dims.end());
    if (!checked_product(shape)) fail_user(kDamaged, "the number of values of a dataset overflows");
    return shape;
  }
  // Rows [first, first + count) as a number of values. Refuses rows that are not there, and extents that the bytes in
  // the file cannot fill: HDF5 would give zeros for what was never written.
  size_t values_of(const std::string& name, int64_t first, int64_t count) const {
    const Id dataset = open(name);
    auto shape = shape_of(dataset);
    const int64_t rows = shape.empty() ? 1 : shape[0];
    if (first < 0 || count < 0 || first > rows - count)
      fail_user(kOtherFile, "'{}' has {} rows, asked for {} from row {}", name, rows, count, first);
    const Id type(H5Dget_type(dataset), H5Tclose);
    const auto bytes = checked_product(shape, static_cast<int64_t>(H5Tget_size(type)));
    const auto stored = static_cast<int64_t>(H5Dget_storage_size(dataset));
    if (!bytes || (!is_new && *bytes / kMostCompression > stored))  // what is being written is stored later
      fail_user(kDamaged, "'{}' says it has {} values, the file holds {} bytes for them", name, *checked_product(shape),
                stored);
    if (!shape.empty()) shape[0] = count;
    return static_cast<size_t>(*checked_product(shape));
  }

  // Opens an attribute of the root group that holds one element; nullopt when it is not there.
  std::optional<Id> attribute(const std::string& name) const {
    const htri_t exists = H5Aexists(file, name.c_str());
    if (exists < 0) fail_io("cannot look up attribute '{}'", name);
    if (exists == 0) return std::nullopt;
    Id attribute(H5Aopen(file, name.c_str(), H5P_DEFAULT), H5Aclose);
    if (!attribute.ok()) fail_io("cannot open attribute '{}'", name);
    const Id space(H5Aget_space(attribute), H5Sclose);
    if (H5Sget_simple_extent_npoints(space) != 1) fail_user(kOtherFile, "attribute '{}' does not hold one value", name);
    return attribute;
  }
  void write_attribute(const std::string& name, hid_t type, const void* data) const {
    if (H5Aexists(file, name.c_str()) > 0 && H5Adelete(file, name.c_str()) < 0)
      fail_io("cannot replace attribute '{}'", name);
    const Id space(H5Screate(H5S_SCALAR), H5Sclose);
    const Id attribute(H5Acreate2(file, name.c_str(), type, space, H5P_DEFAULT, H5P_DEFAULT), H5Aclose);
    if (!attribute.ok() || H5Awrite(attribute, type, data) < 0) fail_io("cannot write attribute '{}'", name);
  }

  void read_rows(const std::string& name, hid_t memory, int64_t first, int64_t count, void* out) const;
  void write(const std::string& name, hid_t memory, const void* data, size_t size,
             const std::vector<int64_t>& shape) const;
};

void Hdf5File::Handle::read_rows(const std::string& name, hid_t memory, int64_t first, int64_t count, void* out) const {
  const Id dataset = open(name);
  const Id type(H5Dget_type(dataset), H5Tclose);
  if (const H5T_class_t kind = H5Tget_class(type); kind != H5T_INTEGER && kind != H5T_FLOAT)
    fail_user(kOtherFile, "'{}' does not hold numbers", name);
  const auto shape = shape_of(dataset);
  std::vector<hsize_t> start(shape.size(), 0), extent(shape.begin(), shape.end());
  if (std::find(extent.begin(), extent.end(), hsize_t{0}) != extent.end() || count == 0) return;
  const Id space(H5Dget_space(dataset), H5Sclose);
  if (!shape.empty()) {
    start[0] = static_cast<hsize_t>(first);
    extent[0] = static_cast<hsize_t>(count);
    H5Sselect_hyperslab(space, H5S_SELECT_SET, start.data(), nullptr, extent.data(), nullptr);
  }
  const Id target(
      shape.empty() ? H5Screate(H5S_SCALAR) : H5Screate_simple(static_cast<int>(extent.size()), extent.data(), nullptr),
      H5Sclose);
  const Id transfer(H5Pcreate(H5P_DATASET_XFER), H5Pclose);
  bool lossy = false;
  H5Pset_type_conv_cb(transfer, refuse_lossy, &lossy);
  if (H5Dread(dataset, memory, target, space, transfer, out) >= 0) return;
  if (lossy) fail_user(kOtherFile, "'{}' holds a value that does not fit the type it is read as", name);
  fail_user(kDamaged, "'{}' cannot be read: {}", name, last_reason());
}

void Hdf5File::Handle::write(const std::string& name, hid_t memory, const void* data, size_t size,
                             const std::vector<int64_t>& shape) const {
  const int64_t elements = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
  MORAINE_CHECK_EQ(static_cast<int64_t>(size), elements);
  const std::vector<hsize_t> dims(shape.begin(), shape.end());
  const Id space(H5Screate_simple(static_cast<int>(dims.size()), dims.data(), nullptr), H5Sclose);
  const Id links(H5Pcreate(H5P_LINK_CREATE), H5Pclose);
  H5Pset_create_intermediate_group(links, 1);
  const Id layout(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
  if (elements > kSmallElements) {
    H5Pset_chunk(layout, static_cast<int>(dims.size()), chunk_of(dims).data());
    H5Pset_shuffle(layout);
    H5Pset_deflate(layout, 4);
  }
  const Id dataset(H5Dcreate2(file, name.c_str(), memory, space, links, layout, H5P_DEFAULT), H5Dclose);
  if (!dataset.ok() || H5Dwrite(dataset, memory, H5S_ALL, H5S_ALL, H5P_DEFAULT, data) < 0)
    fail_io("cannot write dataset '{}'", name);
}

Hdf5File::Hdf5File(const std::filesystem::path& path, Mode mode) : handle_(std::make_unique<Handle>()) {
  const Library library;
  handle_->path = path;
  if (mode == Mode::kCreate) {
    // In memory: HDF5 1.10 crashes at exit after it could not write a file out.
    const Id access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
    H5Pset_fapl_core(access, kMemoryStep, /*backing_store=*/0);
    handle_->is_new = true;
    handle_->file = H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, access);
    if (handle_->file < 0) handle_->fail_io("cannot create the file");
    return;
  }
  require_file(path);
  if (H5Fis_hdf5(path.c_str()) == 0) {
    const char* kind = kind_of_file(Bytes::map_file(path).span());
    handle_->fail_user(kOtherFile, "is no HDF5 file{}{}", kind == nullptr ? "" : ", but ", kind == nullptr ? "" : kind);
  }
  handle_->file = H5Fopen(path.c_str(), H5F_ACC_RDONLY, H5P_DEFAULT);
  if (handle_->file < 0) throw_cannot_open(path);
}

Hdf5File::~Hdf5File() {
  if (!handle_) return;
  if (std::uncaught_exceptions() > handle_->unwinding) handle_->is_new = false;
  try {
    close();
  } catch (const Error& error) {
    log::error("closing a file failed: {}", error.what());
  }
}

Hdf5File::Hdf5File(Hdf5File&&) noexcept = default;

void Hdf5File::close() {
  if (handle_->file < 0) return;
  std::vector<std::byte> image;
  {
    const Library library;
    const Id file(std::exchange(handle_->file, -1), H5Fclose);
    if (!handle_->is_new) return;
    const bool flushed = H5Fflush(file, H5F_SCOPE_LOCAL) >= 0;
    const ssize_t size = flushed ? H5Fget_file_image(file, nullptr, 0) : -1;
    if (size > 0) image.resize(static_cast<size_t>(size));
    if (size < 0 || H5Fget_file_image(file, image.data(), image.size()) != size)
      handle_->fail_io("cannot finish the file");
  }
  write_atomically(handle_->path, image);
}

bool Hdf5File::has(const std::string& dataset) const {
  const Library library;
  return handle_->has(dataset);
}

std::vector<int64_t> Hdf5File::shape(const std::string& dataset) const {
  const Library library;
  return handle_->shape_of(handle_->open(dataset));
}

template <typename T>
std::vector<T> Hdf5File::read(const std::string& dataset, int64_t first, int64_t count) const {
  const Library library;
  std::vector<T> values(handle_->values_of(dataset, first, count));
  handle_->read_rows(dataset, memory_type<T>(), first, count, values.data());
  return values;
}

template <typename T>
std::vector<T> Hdf5File::read_all(const std::string& dataset) const {
  const auto dims = shape(dataset);
  return read<T>(dataset, 0, dims.empty() ? 1 : dims[0]);
}

template <typename T>
void Hdf5File::write(const std::string& dataset, std::span<const T> data, const std::vector<int64_t>& shape) {
  const Library library;
  handle_->write(dataset, memory_type<T>(), data.data(), data.size(), shape);
}

#define MORAINE_INSTANTIATE(T)                                                           \
  template std::vector<T> Hdf5File::read<T>(const std::string&, int64_t, int64_t) const; \
  template std::vector<T> Hdf5File::read_all<T>(const std::string&) const;               \
  template void Hdf5File::write<T>(const std::string&, std::span<const T>, const std::vector<int64_t>&);
MORAINE_INSTANTIATE(uint8_t)
MORAINE_INSTANTIATE(uint16_t)
MORAINE_INSTANTIATE(int32_t)
MORAINE_INSTANTIATE(uint32_t)
MORAINE_INSTANTIATE(int64_t)
MORAINE_INSTANTIATE(uint64_t)
MORAINE_INSTANTIATE(float)
MORAINE_INSTANTIATE(double)
#undef MORAINE_INSTANTIATE

std::vector<Hdf5File::Dataset> Hdf5File::datasets() const {
  const Library library;
  std::vector<Dataset> list;
  for (const std::string& name : handle_->dataset_names()) {
    const Id dataset = handle_->open(name);
    const Id type(H5Dget_type(dataset), H5Tclose);
    list.push_back({name, type_name(type), handle_->shape_of(dataset)});
  }
  return list;
}

std::map<std::string, std::string> Hdf5File::attributes() const {
  std::vector<std::pair<std::string, H5T_class_t>> found;
  {
    const Library library;
    const H5A_operator2_t note = [](hid_t object, const char* name, const H5A_info_t*, void* out) -> herr_t {
      const Id attribute(H5Aopen(object, name, H5P_DEFAULT), H5Aclose);
      const Id space(H5Aget_space(attribute), H5Sclose);
      const Id type(H5Aget_type(attribute), H5Tclose);
      const bool single = H5Sget_simple_extent_npoints(space) == 1;
      static_cast<decltype(found)*>(out)->emplace_back(name, single ? H5Tget_class(type) : H5T_NO_CLASS);
      return 0;
    };
    if (H5Aiterate2(handle_->file, H5_INDEX_NAME, H5_ITER_INC, nullptr, note, &found) < 0)
      handle_->fail_io("cannot list the attributes");
  }
  std::map<std::string, std::string> values;
  for (const auto& [name, kind] : found) {
    if (kind == H5T_STRING) {
      values[name] = *text_attribute(name);
    } else if (kind == H5T_INTEGER) {
      values[name] = std::to_string(*int_attribute(name));
    } else {
      values[name] = "...";
    }
  }
  return values;
}

std::optional<std::string> Hdf5File::text_attribute(const std::string& name) const {
  const Library library;
  const auto attribute = handle_->attribute(name);
  if (!attribute) return std::nullopt;
  const Id type(H5Aget_type(*attribute), H5Tclose);
  if (H5Tget_class(type) != H5T_STRING) handle_->fail_user(kOtherFile, "attribute '{}' is not text", name);
  if (H5Tis_variable_str(type) > 0) {
    char* text = nullptr;
    if (H5Aread(*attribute, type, &text) < 0) handle_->fail_io("cannot read attribute '{}'", name);
    std::string value = text ? text : "";
    H5free_memory(text);
    return value;
  }
  std::string value(H5Tget_size(type), '\0');
  if (H5Aread(*attribute, type, value.data()) < 0) handle_->fail_io("cannot read attribute '{}'", name);
  value.resize(std::min(value.size(), value.find('\0')));  // fixed-length text is padded
  return value;
}

std::optional<int64_t> Hdf5File::int_attribute(const std::string& name) const {
  const Library library;
  const auto attribute = handle_->attribute(name);
  if (!attribute) return std::nullopt;
  const Id type(H5Aget_type(*attribute), H5Tclose);
  if (H5Tget_class(type) != H5T_INTEGER) handle_->fail_user(kOtherFile, "attribute '{}' is not an integer", name);
  int64_t value = 0;
  if (H5Aread(*attribute, H5T_NATIVE_INT64, &value) < 0) handle_->fail_io("cannot read attribute '{}'", name);
  return value;
}

void Hdf5File::set_attribute(const std::string& name, const std::string& value) {
  const Library library;
  const Id type(H5Tcopy(H5T_C_S1), H5Tclose);
  H5Tset_size(type, std::max<size_t>(1, value.size()));  // variable length lies where HDF5 keeps no checksum
  H5Tset_strpad(type, H5T_STR_NULLPAD);
  H5Tset_cset(type, H5T_CSET_UTF8);
  handle_->write_attribute(name, type, value.empty() ? "" : value.data());
}

void Hdf5File::set_attribute(const std::string& name, int64_t value) {
  const Library library;
  handle_->write_attribute(name, H5T_NATIVE_INT64, &value);
}

const std::filesystem::path& Hdf5File::path() const { return handle_->path; }

}  // namespace moraine::core
