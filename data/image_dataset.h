#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace moraine::data {

/// Facts about one prepared image file (docs/data.md).
struct ImageSetInfo {
  std::string name;
  int64_t channels = 0, height = 0, width = 0;
  std::vector<std::string> class_names;  // by label
  std::string fingerprint;               // SHA-256 over shapes, pixels and labels of both splits

  int64_t num_classes() const { return static_cast<int64_t>(class_names.size()); }
  int64_t pixels() const { return channels * height * width; }
};

/// A prepared set of labelled images, splits train and test. A split's pixels are read when first asked for and stay in
/// memory as bytes (47 MB for 60,000 images of 28 x 28), shared by copies. Thread-safe to read.
class ImageDataset {
 public:
  /// Throws UserError if the file is missing, is not an image file of a version this build reads, its parts contradict
  /// each other, or the content is not what the fingerprint says (which reads the whole file, once per process).
  static ImageDataset open(const std::filesystem::path& path);

  const ImageSetInfo& info() const { return info_; }
  const std::filesystem::path& path() const;
  /// Labels of a split ("train" | "test") in file order, each in [0, num_classes). Throws UserError on another split.
  const std::vector<int64_t>& labels(const std::string& split) const;
  /// Images `rows` of a split, row-major [rows, channels, height, width], (pixel / 255 - mean) / deviation.
  /// Throws InternalError on a row outside the split, IoError or UserError when the file cannot be read.
  std::vector<float> batch(const std::string& split, std::span<const int64_t> rows, double mean,
                           double deviation) const;

 private:
  struct Splits;
  ImageDataset(ImageSetInfo info, std::shared_ptr<Splits> splits);

  ImageSetInfo info_;
  std::shared_ptr<Splits> splits_;
};

}  // namespace moraine::data
